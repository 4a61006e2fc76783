"""Chunks give the outputs, the gradients of all parameters and the random draws of the whole batch, in less memory."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmllm.blocks.chunks import chunk_size, count_items, in_chunks, split_batch
from mmllm.blocks.contrast import symmetric_infonce
from mmllm.blocks.memory import free_memory, graph_bytes
from mmllm.blocks.tiled_contrast import contrast

B, WIDTH, D = 13, 8, 6


class Towers(nn.Module):
    """Two heads on one shared tower, with dropout and draws from numpy and ``random``."""

    def __init__(self, dropout: float = 0.0, noise: float = 0.0):
        super().__init__()
        torch.manual_seed(0)
        self.shared = nn.Sequential(nn.Linear(WIDTH, 16), nn.GELU(), nn.Dropout(dropout))
        self.image, self.text = nn.Linear(16, D), nn.Linear(16, D)
        self.logit_scale, self.noise, self.calls = nn.Parameter(torch.tensor(2.0)), noise, 0

    def forward(self, batch):
        self.calls += 1
        images = batch["image"] + self.noise * (random.random() + float(np.random.rand()))
        image = F.normalize(self.image(self.shared(images)), dim=-1)
        return {"image": image, "text": F.normalize(self.text(self.shared(batch["text"])), dim=-1)}


def batch():
    generator = torch.Generator().manual_seed(1)
    return {k: torch.randn(B, WIDTH, generator=generator) for k in ("image", "text")}


def seed():
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)


def gradients(model, out):
    """All parameters' gradients of the symmetric InfoNCE over the whole batch."""
    model.zero_grad()
    symmetric_infonce(model.logit_scale.exp() * out["image"] @ out["text"].T).mean().backward()
    return {name: p.grad for name, p in model.named_parameters()}


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert value.abs().sum() > 0
        torch.testing.assert_close(found[name], value, msg=name)


@pytest.mark.parametrize("size", [1, 4, 7, 13, 50])
def test_every_gradient_equals_that_of_the_whole_batch(size):
    model = Towers()
    expected = gradients(model, model(batch()))
    same(gradients(model, in_chunks(model, batch(), size)), expected)


def test_the_logit_scale_gets_its_gradient_once_whatever_the_number_of_chunks():
    model = Towers()
    once = gradients(model, model(batch()))["logit_scale"]
    for size in (7, 4, 2):
        torch.testing.assert_close(gradients(model, in_chunks(model, batch(), size))["logit_scale"], once)


def test_the_tiled_loss_on_chunks_equals_the_plain_loss_on_the_whole_batch():
    model = Towers()
    expected = gradients(model, model(batch()))
    model.zero_grad()
    out = in_chunks(model, batch(), 5)
    contrast(out["image"], out["text"], scale=model.logit_scale.exp(), symmetric=True, tile=4).mean().backward()
    same({name: p.grad for name, p in model.named_parameters()}, expected)


def test_random_draws_repeat_in_the_second_run_and_go_on_after_it():
    """The reference keeps the graphs of all chunks, as memory allows it here."""
    model = Towers(dropout=0.4, noise=1.0)
    seed()
    parts = [model(part) for part in split_batch(batch(), 5)]
    expected = gradients(model, {k: torch.cat([p[k] for p in parts]) for k in parts[0]})
    after = torch.rand(3), np.random.rand(), random.random()
    seed()
    same(gradients(model, in_chunks(model, batch(), 5)), expected)
    assert torch.equal(torch.rand(3), after[0]) and (np.random.rand(), random.random()) == after[1:]


def test_the_second_run_has_the_autocast_of_the_first():
    model, kinds = Towers(), []

    def encode(part):
        out = model(part)
        kinds.append(model.image(part["image"].repeat(1, 2)).dtype)
        return out

    with torch.autocast("cpu", torch.bfloat16):
        whole, chunks = model(batch()), in_chunks(encode, batch(), 4)
    expected, found = gradients(model, whole), gradients(model, chunks)
    assert kinds == 7 * [torch.bfloat16]
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 0.02 * value.norm(), name


def test_one_run_more_for_all_chunks_but_the_last_and_none_without_gradients():
    model = Towers()
    for size, calls in ((B, 1), (5, 5)):
        model.calls = 0
        gradients(model, in_chunks(model, batch(), size))
        assert model.calls == calls
    model.calls = 0
    with torch.no_grad():
        in_chunks(model, batch(), 5)
    assert model.calls == 3
    frozen = Towers().requires_grad_(False)
    assert not in_chunks(frozen, batch(), 5)["image"].requires_grad and frozen.calls == 3


def test_a_second_backward_runs_the_chunks_again():
    model = Towers()
    loss = in_chunks(model, batch(), 5)["image"].square().sum(0)[0]
    loss.backward(retain_graph=True)
    once = model.image.weight.grad.clone()
    loss.backward()
    torch.testing.assert_close(model.image.weight.grad, 2 * once)


def test_the_graph_of_many_chunks_is_as_large_as_that_of_one():
    model, whole = Towers(), {k: v.repeat(16, 1) for k, v in batch().items()}
    one = graph_bytes(lambda: model(batch()), apart=batch().values())
    many = graph_bytes(lambda: in_chunks(model, whole, B), apart=whole.values())
    assert one * 0.9 < many < one * 1.1
    assert graph_bytes(lambda: model(whole), apart=whole.values()) > 10 * one


@dataclass
class Out:
    pooled: torch.Tensor
    mask: torch.Tensor | None
    names: list[str]
    grid: tuple[int, int]
    layers: dict[int, Any]


def test_nested_inputs_and_outputs_are_cut_and_joined_item_by_item():
    weight = nn.Parameter(torch.ones(2))

    def encode(part):
        (x, names), scale = part["x"], part["scale"]
        assert len(x) == len(names) <= 2 and part["table"].shape == (4,)
        return Out(x * weight * scale, None, [n.upper() for n in names], (3, 4), {2: (x > 2, x * weight)})

    given = {"x": (torch.arange(10.0).view(5, 2), list("abcde")), "scale": 2.0, "table": torch.zeros(4)}
    out = in_chunks(encode, given, 2)
    assert torch.equal(out.pooled, given["x"][0] * 2) and out.names == list("ABCDE") and out.grid == (3, 4)
    assert out.mask is None and torch.equal(out.layers[2][0], given["x"][0] > 2)
    out.layers[2][1].sum().backward()
    assert torch.equal(weight.grad, given["x"][0].sum(0))


def test_what_would_lose_its_gradient_is_refused():
    w = nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="gradient"):
        in_chunks(lambda x: x * w, torch.ones(4, 1, requires_grad=True), 2)
    with pytest.raises(ValueError, match="scalar"):
        in_chunks(lambda x: (x * w).sum(), torch.ones(4, 1), 2)
    with pytest.raises(ValueError, match="no tensor"):
        count_items({"a": 1.0})


def test_chunk_size_divides_the_memory_by_what_an_item_keeps():
    weight = nn.Parameter(torch.randn(10, 10))
    x = torch.randn(12, 10)

    def encode(x):
        return (x @ weight).exp().exp()  # keeps two results of 10 floats each

    state = torch.get_rng_state()
    assert chunk_size(encode, x, memory=int(80 * 5 / 0.4)) == 4  # 5 fit: 3 equal chunks
    assert chunk_size(encode, x, memory=1) == 1
    assert chunk_size(encode, x) == 12
    assert torch.equal(state, torch.get_rng_state())


def test_free_memory_is_a_sensible_number():
    assert 2**20 < free_memory(torch.device("cpu")) < 2**50
