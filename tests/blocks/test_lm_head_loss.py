"""The head's loss in chunks: value and gradients of plain cross-entropy, and never many logits at once."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from mmllm.blocks import head as head_module
from mmllm.blocks.head import loss_at_head
from mmllm.blocks.lm_head_loss import lm_head_loss

N, H, V = 23, 6, 40


def parts(dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    tensors = [torch.randn(N, H, dtype=dtype), torch.randn(V, H, dtype=dtype), torch.randn(V, dtype=dtype)]
    return [t.requires_grad_(True) for t in tensors], torch.randint(0, V, (N,)), torch.rand(N, dtype=torch.float64)


def plain(hidden, weight, targets, share=None, bias=None, scale=1.0, softcap=None):
    z = F.linear(hidden, weight, bias) * scale
    z = z if softcap is None else torch.tanh(z / softcap) * softcap
    each = F.cross_entropy(z.float() if z.dtype != torch.float64 else z, targets, reduction="none")
    return each.mean() if share is None else (each * share).sum() / share.sum()


@pytest.mark.parametrize("chunk", [1, 7, 23, 100])
@pytest.mark.parametrize("options", [{}, {"scale": 0.3}, {"softcap": 2.0}, {"scale": 1.7, "softcap": 1.5}], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_value_and_gradients_are_those_of_plain_cross_entropy(chunk, options, weighted):
    tensors, targets, share = parts()
    share = share if weighted else None
    ours = lm_head_loss(tensors[0], tensors[1], targets, share, tensors[2], chunk=chunk, **options)
    theirs = plain(tensors[0], tensors[1], targets, share, tensors[2], **options)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)
    for a, b in zip(torch.autograd.grad(3 * ours, tensors), torch.autograd.grad(3 * theirs, tensors)):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-10)


def test_numeric_gradient_and_parts_that_do_not_train():
    tensors, targets, _ = parts()
    assert torch.autograd.gradcheck(lambda h, w: lm_head_loss(h, w, targets, chunk=5), tensors[:2])
    hidden, weight = tensors[0], tensors[1].detach()
    lm_head_loss(hidden, weight, targets, chunk=5).backward()
    assert hidden.grad is not None and weight.grad is None
    with torch.no_grad():
        torch.testing.assert_close(lm_head_loss(hidden, weight, targets), plain(hidden, weight, targets))
    with pytest.raises(ValueError, match="no supervised"):
        lm_head_loss(hidden[:0], weight, targets[:0])


def test_bfloat16_is_as_near_to_the_exact_gradient_as_plain_bfloat16():
    exact, targets, _ = parts()
    want = torch.autograd.grad(plain(*exact[:2], targets), exact[:2])
    low = [t.detach().bfloat16().requires_grad_(True) for t in exact[:2]]
    ours = torch.autograd.grad(lm_head_loss(*low, targets, chunk=5), low)
    theirs = torch.autograd.grad(plain(*low, targets), low)
    for a, b, w in zip(ours, theirs, want):
        assert a.dtype == torch.bfloat16
        assert (a - w).norm() < 1.3 * (b - w).norm() + 1e-3 * w.norm()


class Largest(TorchDispatchMode):
    """The largest tensor that any operation gives."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor):
                self.numbers = max(self.numbers, t.numel())
        return out


def test_no_tensor_is_larger_than_a_chunk_of_logits_or_the_weight():
    hidden, weight = torch.randn(200, 4, requires_grad=True), torch.randn(50, 4, requires_grad=True)
    with Largest() as seen:
        lm_head_loss(hidden, weight, torch.zeros(200, dtype=torch.long), chunk=10).backward()
    assert seen.numbers == max(10 * 50, hidden.numel())


# ---- inside a model's head ---------------------------------------------------------------------------------------


class Wrapped(torch.nn.Linear):
    """A head that is no plain linear layer."""

    def forward(self, x):
        return super().forward(x) + 0.1 * x.sum(-1, keepdim=True)


class Model(torch.nn.Module):
    def __init__(self, head, **config):
        super().__init__()
        self.head = head
        text = type("Config", (), config)()
        self.config = type("Config", (), {"get_text_config": lambda _: text})()

    def get_output_embeddings(self):
        return self.head

    def forward(self, states):
        c = self.config.get_text_config()
        z = self.head(states) / getattr(c, "logits_scaling", 1.0)
        cap = getattr(c, "final_logit_softcapping", None)
        return z if cap is None else cap * torch.tanh(z / cap)


@pytest.mark.parametrize("kind", [torch.nn.Linear, Wrapped])
@pytest.mark.parametrize("config", [{}, {"logits_scaling": 4.0}, {"final_logit_softcapping": 1.5}], ids=str)
def test_a_models_head_gives_the_loss_of_its_logits(kind, config, monkeypatch):
    monkeypatch.setattr(head_module, "CHUNK", 3 * V)
    torch.manual_seed(0)
    model = Model(kind(H, V), **config)
    states = torch.randn(2, 9, H, requires_grad=True)
    rows, columns = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([2, 5, 0, 3, 8])
    targets, share = torch.randint(0, V, (5,)), torch.rand(5)
    with loss_at_head(model, rows, columns, targets, share) as found:
        first = model(states)
    logits = model(states)  # the head is itself again
    assert logits.shape == (2, 9, V)
    torch.testing.assert_close(found.first, logits[:1, 2:3])
    torch.testing.assert_close(first, found.first)
    each = F.cross_entropy(logits[rows, columns], targets, reduction="none")
    expected = (each * share).sum() / share.sum()
    torch.testing.assert_close(found.loss, expected)
    wanted = [states, *model.head.parameters()]
    for a, b in zip(torch.autograd.grad(found.loss, wanted), torch.autograd.grad(expected, wanted)):
        torch.testing.assert_close(a, b)
