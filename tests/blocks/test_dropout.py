"""Dropout on a CPU: its probability, its expectation, its gradient, and torch's own where it says nothing new."""

from __future__ import annotations

import math

import pytest
import torch

from mmllm.blocks.dropout import Dropout


@pytest.mark.parametrize("p", [0.05, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_drops_with_its_probability_and_keeps_the_mean(p, dtype):
    torch.manual_seed(0)
    x = torch.ones(301, 997, dtype=dtype, requires_grad=True)  # no multiple of four
    y = Dropout(p)(x)
    share = float((y == 0).float().mean())
    assert abs(share - p) < 5 * math.sqrt(p * (1 - p) / x.numel())
    kept = y.detach()[y != 0]
    assert torch.all(kept == kept[0]) and float(kept[0]) == pytest.approx(1 / (1 - p), rel=4e-3)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())  # what is dropped gets no gradient


def test_elements_are_dropped_independently():
    torch.manual_seed(0)
    gone = (Dropout(0.5)(torch.ones(400_000)) == 0).float() - 0.5
    for lag in (1, 2, 3, 4, 5, 8):  # four neighbours share a draw
        assert abs(float((gone[lag:] * gone[:-lag]).mean())) < 0.25 * 5 / math.sqrt(len(gone))


def test_the_seed_decides_and_evaluation_changes_nothing():
    x, layer = torch.randn(64, 33), Dropout(0.3)
    torch.manual_seed(1)
    first = layer(x)
    assert not torch.equal(first, layer(x))
    torch.manual_seed(1)
    assert torch.equal(first, layer(x))
    assert torch.equal(layer.eval()(x), x)
    assert torch.equal(Dropout(0.0)(x), x) and torch.equal(Dropout(1.0)(x), torch.zeros_like(x))
    assert not Dropout(0.3).state_dict()
