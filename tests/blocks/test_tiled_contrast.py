"""The tiled losses equal dense ones written out with autograd, in value and in every gradient, for every option."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from mmllm.blocks.contrast import sigmoid_contrast, softmax_contrast, symmetric_infonce
from mmllm.blocks.tiled_contrast import contrast, tiled_sigmoid

R, C, Q, D = 7, 9, 4, 5


def vectors(n, seed, dtype=torch.float64):
    return F.normalize(torch.randn(n, D, generator=torch.Generator().manual_seed(seed), dtype=dtype), dim=-1)


def uniform(*shape, seed):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def of(matrix):
    """A function of pairs that reads a whole matrix."""
    return lambda i, j: matrix[i, j]


def dense(z, target, allow, log_weight, smoothing=0.0, inside=True, divergence="cross_entropy", margin=0.2, floor=1e-8):
    """The loss of each row of a whole score matrix, as the docstring of ``contrast`` defines it."""
    target = target.double() * allow
    mass = target.sum(1, keepdim=True)
    q = (1 - smoothing) * target / mass.clamp(min=1e-12) + smoothing * allow.double() / allow.sum(1, keepdim=True)
    hit = (q * z).sum(1)
    if divergence == "cross_entropy":
        kept = allow if inside else allow & (target == 0)
        loss = (z + log_weight).masked_fill(~kept, -math.inf).logsumexp(1) - hit
    elif divergence == "reverse_kl":
        log_p = (z + log_weight).masked_fill(~allow, -math.inf).log_softmax(1)
        loss = (log_p.exp() * (log_p.masked_fill(~allow, 0) - (q + floor).log())).sum(1)
    else:
        gap = (margin + z - hit[:, None]).clamp(min=0).masked_fill(~allow | (target > 0), 0)
        loss = gap.sum(1) if divergence == "hinge" else gap.amax(1)
    return torch.where(mass[:, 0] > 0, loss, 0.0)


CASES = {
    "plain": {},
    "smoothing": {"smoothing": 0.1},
    "outside": {"inside": False},
    "reverse": {"divergence": "reverse_kl"},
    "reverse smoothed": {"divergence": "reverse_kl", "smoothing": 0.2},
    "hinge": {"divergence": "hinge", "margin": 0.4},
    "hardest hinge": {"divergence": "hardest_hinge", "margin": 0.4},
}
TARGETS = ("diagonal", "several", "soft")


def options(case):
    names = {"smoothing": "label_smoothing", "inside": "positive_in_denominator"}
    return {names.get(k, k): v for k, v in case.items()}


def gradients(loss, weight, inputs):
    return torch.autograd.grad((loss * weight).sum(), inputs)


@pytest.mark.parametrize("tile", [(3, 4), (2, 5), 100])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("name", CASES)
def test_every_option_equals_the_dense_loss(name, kind, masked, tile):
    case = CASES[name]
    rows, cols, extra = (vectors(n, k).requires_grad_() for k, n in enumerate((R, C, Q)))
    scale = torch.tensor(6.0, dtype=torch.float64, requires_grad=True)
    n = C + Q
    target = {
        "diagonal": torch.eye(R, n),
        "several": (uniform(R, n, seed=3) > 0.7),
        "soft": uniform(R, n, seed=4) * (uniform(R, n, seed=5) > 0.3),
    }[kind]
    target = target.clone()
    target[2] = 0 if kind != "diagonal" else target[2]
    allow = uniform(R, n, seed=6) > 0.25 if masked else torch.ones(R, n, dtype=torch.bool)
    factor = 0.5 + uniform(R, n, seed=7) if masked else torch.ones(R, n, dtype=torch.float64)
    weighted = masked and "hinge" not in name
    log_weight = uniform(R, n, seed=8) - 0.5 if weighted else torch.zeros(R, n, dtype=torch.float64)
    said = {"target_fn": of(target)} if kind != "diagonal" else {}
    if masked:
        said |= {"allow_fn": of(allow), "scale_fn": of(factor)}
        said |= {"log_weight_fn": of(log_weight)} if weighted else {}

    ours = contrast(rows, cols, scale=scale, extra_cols=extra, tile=tile, **said, **options(case))
    expected = dense(scale * factor * (rows @ torch.cat([cols, extra]).T), target, allow, log_weight, **case)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
    assert ours.abs().max() > 0.1
    weight = torch.linspace(-1, 2, R, dtype=torch.float64)
    inputs = [rows, cols, extra, scale]
    for a, b in zip(gradients(ours, weight, inputs), gradients(expected, weight, inputs)):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", TARGETS)
def test_symmetric_equals_both_directions_run_alone(name, kind):
    rows, cols = (vectors(R, k).requires_grad_() for k in (0, 1))
    scale = torch.tensor(6.0, dtype=torch.float64, requires_grad=True)
    target = {"diagonal": torch.eye(R), "several": uniform(R, R, seed=3) > 0.6, "soft": uniform(R, R, seed=4)}[kind]
    allow, weight = uniform(R, R, seed=6) > 0.2, uniform(R, R, seed=8)
    case = options(CASES[name])
    if "hinge" in name:
        case["margin"] = uniform(R, seed=9)

    def run(a, b, turn, **more):
        said = {"target_fn": of(turn(target)), "allow_fn": of(turn(allow))}
        said |= {} if "hinge" in name else {"log_weight_fn": of(turn(weight))}
        return contrast(a, b, scale=scale, tile=(3, 4), **said, **case, **more)

    both = run(rows, cols, lambda m: m, symmetric=True)
    alone = 0.5 * (run(rows, cols, lambda m: m) + run(cols, rows, lambda m: m.T))
    torch.testing.assert_close(both, alone)
    w = torch.linspace(-1, 2, R, dtype=torch.float64)
    for a, b in zip(gradients(both, w, [rows, cols, scale]), gradients(alone, w, [rows, cols, scale])):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("several", [False, True])
def test_symmetric_equals_the_plain_symmetric_infonce(smoothing, several):
    rows, cols = (vectors(8, k, torch.float32).requires_grad_() for k in (0, 1))
    labels = torch.tensor([0, 1, 2, 0, 3, 4, 1, 0])
    positive = labels[:, None] == labels if several else None
    said = {"target_fn": of(positive)} if several else {}
    ours = contrast(rows, cols, scale=20.0, symmetric=True, label_smoothing=smoothing, tile=3, **said)
    plain = symmetric_infonce(20.0 * rows @ cols.T, positive, smoothing)
    torch.testing.assert_close(ours, plain)
    for a, b in zip(gradients(ours, 1.0, [rows, cols]), gradients(plain, 1.0, [rows, cols])):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", TARGETS)
def test_sigmoid_equals_the_plain_one(kind):
    rows, cols = vectors(R, 0).requires_grad_(), vectors(C, 1).requires_grad_()
    scale, bias = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (8.0, -3.0))
    target = {"diagonal": torch.eye(R, C), "several": uniform(R, C, seed=3) > 0.7, "soft": uniform(R, C, seed=4)}[kind]
    allow, factor = uniform(R, C, seed=6) > 0.2, 0.5 + uniform(R, C, seed=7)
    logits = scale * factor * (rows @ cols.T) + bias
    expected = F.binary_cross_entropy_with_logits(logits, target.double(), reduction="none")
    ours = tiled_sigmoid(
        rows, cols, scale=scale, bias=bias, target_fn=of(target), allow_fn=of(allow), scale_fn=of(factor), tile=(3, 4)
    )
    torch.testing.assert_close(ours, (expected * allow).sum(1))
    inputs, w = [rows, cols, scale, bias], torch.linspace(-1, 2, R, dtype=torch.float64)
    for a, b in zip(gradients(ours, w, inputs), gradients((expected * allow).sum(1), w, inputs)):
        torch.testing.assert_close(a, b)
    ours, plain = (
        tiled_sigmoid(rows, cols, scale=scale, bias=bias, tile=2),
        sigmoid_contrast(scale * rows @ cols.T + bias),
    )
    torch.testing.assert_close(ours, plain.double(), rtol=1e-5, atol=0)


def test_a_right_pair_with_a_high_score_keeps_its_small_sigmoid_loss():
    one = torch.ones(1, 1)
    torch.testing.assert_close(tiled_sigmoid(one, one, scale=18.0), torch.tensor([math.log1p(math.exp(-18))]))


def late_interaction(rows, cols, temperature):
    """Mean over row tokens of the best column token, both under masks, as a score_fn of token sets."""
    (x, x_mask), (y, y_mask) = rows, cols
    z = torch.einsum("rnd,cmd->rcnm", x, y).masked_fill(~y_mask[None, :, None], -math.inf).amax(-1)
    return (z * x_mask[:, None]).sum(-1) / x_mask.sum(-1)[:, None] / temperature


@pytest.mark.parametrize("name", CASES)
def test_any_score_function_gets_exact_gradients_its_arguments_included(name):
    torch.manual_seed(0)
    x, y = (torch.randn(n, 3, D, dtype=torch.float64, requires_grad=True) for n in (R, C))
    masks = [torch.rand(n, 3) > 0.3 for n in (R, C)]
    for m in masks:
        m[:, 0] = True
    temperature = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    factor = 0.5 + uniform(R, C, seed=7)
    ours = contrast(
        (x, masks[0]), (y, masks[1]), scale=scale, score_fn=late_interaction, score_args=[temperature],
        scale_fn=of(factor), tile=(3, 4), **options(CASES[name]),
    )  # fmt: skip
    z = scale * factor * late_interaction((x, masks[0]), (y, masks[1]), temperature)
    allowed, zero = torch.ones(R, C, dtype=torch.bool), torch.zeros(R, C)
    expected = dense(z, torch.eye(R, C), allowed, zero, **CASES[name])
    torch.testing.assert_close(ours, expected)
    inputs, w = [x, y, temperature, scale], torch.linspace(-1, 2, R, dtype=torch.float64)
    for a, b in zip(gradients(ours, w, inputs), gradients(expected, w, inputs)):
        torch.testing.assert_close(a, b)


def test_sigmoid_and_symmetric_take_a_score_function_too():
    rows, cols = (vectors(R, k).requires_grad_() for k in (0, 1))
    bias = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)

    def dot(x, y):
        return x @ y.T

    for one, two in (
        (contrast(rows, cols, scale=5.0, symmetric=True, tile=3), {"symmetric": True}),
        (tiled_sigmoid(rows, cols, scale=5.0, bias=bias, tile=3), {"bias": bias}),
    ):
        loss = contrast if "symmetric" in two else tiled_sigmoid
        other = loss(rows, cols, scale=5.0, score_fn=dot, tile=2, **two)
        inputs = [rows, cols] + ([bias] if "bias" in two else [])
        for a, b in zip(gradients(one, 1.0, inputs), gradients(other, 1.0, inputs)):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("divergence", ["cross_entropy", "reverse_kl", "hinge"])
def test_gradcheck(divergence):
    rows, cols = (vectors(4, k).requires_grad_() for k in (0, 1))
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, y, s: contrast(x, y, scale=s, symmetric=True, divergence=divergence, tile=(2, 3)),
        (rows, cols, scale),
    )


def test_gradcheck_sigmoid():
    rows, cols = (vectors(4, k).requires_grad_() for k in (0, 1))
    scalars = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (3.0, -1.0)]
    assert torch.autograd.gradcheck(
        lambda x, y, s, b: tiled_sigmoid(x, y, scale=s, bias=b, tile=3), (rows, cols, *scalars)
    )


def test_permuting_the_items_permutes_the_losses():
    rows, cols = vectors(8, 0), vectors(8, 1)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    loss = contrast(rows, cols, scale=9.0, symmetric=True, tile=3)
    torch.testing.assert_close(contrast(rows[order], cols[order], scale=9.0, symmetric=True, tile=3), loss[order])


def test_tile_sizes_change_nothing():
    rows, cols = vectors(11, 0), vectors(11, 1)
    expected = softmax_contrast(9.0 * rows @ cols.T).double()
    for tile in itertools.product((1, 4, 11, 50), repeat=2):
        torch.testing.assert_close(contrast(rows, cols, scale=9.0, tile=tile), expected, rtol=1e-6, atol=1e-6)


class Largest(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            self.elements = max(self.elements, x.numel() if isinstance(x, torch.Tensor) else 0)
        return out


@pytest.mark.parametrize("divergence", ["cross_entropy", "reverse_kl", "hinge", "sigmoid"])
def test_no_tensor_is_larger_than_the_inputs_or_a_tile(divergence):
    n = 64
    rows, cols = vectors(n, 0).requires_grad_(), vectors(n, 1).requires_grad_()
    labels = torch.arange(n) // 2
    said = {"target_fn": lambda i, j: labels[i][:, None] == labels[j], "tile": 8}
    with Largest() as largest:
        if divergence == "sigmoid":
            loss = tiled_sigmoid(rows, cols, scale=5.0, **said)
        else:
            loss = contrast(rows, cols, scale=5.0, symmetric=True, divergence=divergence, **said)
        loss.mean().backward()
    assert largest.elements == n * D


def test_scores_far_apart_neither_overflow_nor_vanish():
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    cols = torch.tensor([[1.0, 0.0], [-1.0, -0.5]])
    ours = contrast(rows, cols, scale=500.0, tile=1)
    torch.testing.assert_close(ours, torch.tensor([0.0, 250.0]))
    ours = contrast(rows, cols, scale=500.0, symmetric=True, tile=2)
    torch.testing.assert_close(ours, symmetric_infonce(500.0 * rows @ cols.T))


def test_rows_without_target_or_without_any_allowed_column_count_nothing():
    rows, cols = vectors(3, 0).requires_grad_(), vectors(3, 1)
    allow = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 0, 0]]).bool()
    loss = contrast(rows, cols, scale=5.0, allow_fn=of(allow), tile=2)
    assert loss[0] > 0 and loss[1] == 0 and loss[2] == 0
    (grad,) = torch.autograd.grad(loss.sum(), rows)
    assert grad[0].abs().sum() > 0 and torch.equal(grad[1:], torch.zeros_like(grad[1:]))


def test_what_is_not_allowed_gets_no_gradient_at_all():
    rows, cols = vectors(3, 0), vectors(4, 1).requires_grad_()
    loss = contrast(rows, cols, allow_fn=lambda i, j: torch.arange(4)[j].expand(i.stop - i.start, -1) < 3, tile=2)
    (grad,) = torch.autograd.grad(loss.sum(), cols)
    assert torch.equal(grad[3], torch.zeros_like(grad[3])) and (grad[:3] != 0).all()


def test_only_what_needs_a_gradient_gets_one():
    rows, queue = vectors(3, 0).requires_grad_(), vectors(5, 2)
    cols = vectors(3, 1)
    contrast(rows, cols, extra_cols=queue, scale=4.0).sum().backward()
    assert rows.grad is not None and cols.grad is None and queue.grad is None


def test_bfloat16_vectors_are_multiplied_as_they_are_and_give_a_float32_loss():
    torch.manual_seed(0)
    rows, cols = (F.normalize(torch.randn(40, 16), dim=-1).bfloat16().requires_grad_() for _ in range(2))
    loss = contrast(rows, cols, scale=10.0, symmetric=True, tile=16)
    assert loss.dtype == torch.float32
    plain = symmetric_infonce(10.0 * rows.float() @ cols.float().T)
    torch.testing.assert_close(loss, plain, rtol=0, atol=0.03)
    ours, expected = (torch.autograd.grad(x.mean(), rows)[0].float() for x in (loss, plain))
    assert (ours - expected).norm() < 0.02 * expected.norm()
    with torch.autocast("cpu", torch.bfloat16):
        other = contrast(rows.float(), cols.float(), scale=10.0, symmetric=True, tile=16)
        scored = contrast(rows, cols.float(), score_fn=lambda x, y: x @ y.T, scale=10.0, symmetric=True, tile=16)
    assert torch.equal(other, loss)
    torch.testing.assert_close(scored, loss)
    assert (torch.autograd.grad(scored.mean(), rows)[0].float() - expected).norm() < 0.02 * expected.norm()


def test_options_that_do_not_go_together_are_refused():
    rows, cols = vectors(3, 0), vectors(4, 1)
    for wrong in (
        {"symmetric": True},
        {"divergence": "forward"},
        {"divergence": "hinge", "label_smoothing": 0.1},
        {"divergence": "reverse_kl", "positive_in_denominator": False},
        {"label_smoothing": 2.0},
        {"scale": torch.ones(3)},
        {"target_fn": lambda i, j: torch.ones(1, 1)},
    ):
        with pytest.raises(ValueError):
            contrast(rows, cols, **wrong)
    with pytest.raises(ValueError, match="target_fn"):
        contrast(cols, rows)
