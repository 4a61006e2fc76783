"""Geometry of embeddings against closed forms and plain numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mmllm.evaluate.geometry import (
    alignment,
    effective_rank,
    geometry_figures,
    linear_cka,
    modality_gap,
    uniformity,
)


def random(n=40, d=6, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def rotation(d=6, seed=5):
    return torch.linalg.qr(random(d, d, seed))[0]


def test_gap_of_two_cones():
    angle = 0.7
    x = torch.tensor([[1.0, 0.0]]).repeat(5, 1) * torch.arange(1, 6)[:, None]  # lengths do not matter
    y = torch.tensor([[math.cos(angle), math.sin(angle)]]).repeat(3, 1)
    assert modality_gap(x, y) == pytest.approx(2 * math.sin(angle / 2))
    assert modality_gap(x, x) == 0


def test_alignment_and_uniformity_against_loops():
    x, y = random(), random(seed=1)
    a, b = (v.numpy() / np.linalg.norm(v.numpy(), axis=1, keepdims=True) for v in (x, y))
    assert alignment(x, y) == pytest.approx(np.mean([np.linalg.norm(p - q) ** 2 for p, q in zip(a, b)]), rel=1e-6)
    assert alignment(x, y, 1) == pytest.approx(np.mean(np.linalg.norm(a - b, axis=1)), rel=1e-6)
    pairs = [math.exp(-2 * np.sum((a[i] - a[j]) ** 2)) for i in range(40) for j in range(40) if i != j]
    for chunk in (1024, 7):
        assert uniformity(x, chunk=chunk) == pytest.approx(math.log(np.mean(pairs)), rel=1e-5)
    assert uniformity(torch.ones(9, 4)) == pytest.approx(0, abs=1e-9)
    opposite = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert uniformity(opposite) == pytest.approx(-8)  # distance 2, t = 2
    assert math.isnan(uniformity(torch.ones(1, 4)))


def test_cka_invariances_and_zero():
    x = random(50)
    assert linear_cka(x, -3 * x @ rotation() + 2) == pytest.approx(1)
    y = random(50, 3, 1)
    assert linear_cka(x, y) == pytest.approx(linear_cka(y, x))
    xc, yc = (v.numpy() - v.numpy().mean(0) for v in (x, y))
    k, m = xc @ xc.T, yc @ yc.T  # the kernel form of the same number
    assert linear_cka(x, y) == pytest.approx((k * m).sum() / np.sqrt((k * k).sum() * (m * m).sum()), rel=1e-5)
    centred = x.double() - x.double().mean(0)
    basis = torch.linalg.svd(centred)[0]
    left = basis[:, 6:9] - basis[:, 6:9].mean(0)
    assert linear_cka(centred, left - centred @ torch.linalg.lstsq(centred, left).solution) == pytest.approx(
        0, abs=1e-12
    )


def test_effective_rank():
    assert effective_rank(torch.eye(7)) == pytest.approx(7)
    assert effective_rank(torch.outer(torch.arange(1.0, 9), torch.ones(5))) == pytest.approx(1)
    two = torch.diag(torch.tensor([3.0, 1.0]))
    assert effective_rank(two) == pytest.approx(math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25))))
    x = random(100, 5) + 50
    assert effective_rank(x) < 1.5 < 4 < effective_rank(x, centre=True) <= 5
    assert effective_rank(x @ rotation(5)) == pytest.approx(effective_rank(x), rel=1e-5)


def test_figures_have_a_control():
    x = random(60)
    found = {f.name: f for f in geometry_figures("g", "image", "text", x, x @ rotation() + 0.01)}
    assert set(found) == {
        "g_image_text_gap", "g_image_text_alignment", "g_image_text_cka", "g_image_text_uniformity_image",
        "g_image_text_uniformity_text", "g_image_text_effective_rank_image", "g_image_text_effective_rank_text",
    }  # fmt: skip
    cka = found["g_image_text_cka"]
    assert cka.value == pytest.approx(1, abs=1e-3) and cka.control < 0.5
    assert found["g_image_text_gap"].better == "lower"
