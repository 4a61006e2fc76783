"""Sparsemax against its closed form for two entries, the simplex's defining property, and its Jacobian."""

from __future__ import annotations

import torch

from mmllm.blocks.sparsemax import sparsemax


def test_two_entries_have_a_closed_form():
    z = torch.tensor([[0.3, -0.2], [1.0, 1.0], [2.0, 0.5]])
    expected = torch.tensor([[0.75, 0.25], [0.5, 0.5], [1.0, 0.0]])
    torch.testing.assert_close(sparsemax(z), expected)


def test_nearest_point_of_the_simplex():
    z = 2 * torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    p = sparsemax(z)
    torch.testing.assert_close(p.sum(-1), torch.ones(5))
    assert (p >= 0).all() and (p == 0).any()
    torch.testing.assert_close(sparsemax(z + 7.0), p)
    # p is the projection if and only if no corner lies on the far side of it: <z - p, e_j - p> <= 0.
    gap = z - p
    assert (gap - (gap * p).sum(-1, keepdim=True) <= 1e-5).all()


def test_gradient_stays_within_the_support():
    z = torch.tensor([0.5, 0.1, -3.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(sparsemax, (z,))
    jacobian = torch.autograd.functional.jacobian(sparsemax, z.detach())
    expected = torch.tensor([[0.5, -0.5, 0], [-0.5, 0.5, 0], [0, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(jacobian, expected)


def test_excluded_entries_get_nothing():
    z = torch.tensor([[0.2, float("-inf"), 0.1]])
    torch.testing.assert_close(sparsemax(z), torch.tensor([[0.55, 0.0, 0.45]]))
