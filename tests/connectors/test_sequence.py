"""The sequence connector: one token for each frame, in an order that counts."""

from __future__ import annotations

import pytest
import torch

from mmllm.connectors import build_connector
from mmllm.contracts import Features
from mmllm.errors import UserError


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_it_knows_order_and_lengths():
    torch.manual_seed(0)
    made = build_connector({"type": "sequence", "in_dim": 6, "out_dim": 4, "frames": 3, "hidden_dim": 8}).eval()
    x, mask = random(2, 6, 6), torch.ones(2, 6, dtype=torch.bool)
    mask[1, 4:] = False
    tokens, there = made(Features(x, mask, x.mean(1)))
    assert tokens.shape == (2, 3, 4) and there.tolist() == [[True] * 3, [True, True, False]]
    swapped = x[:, [2, 3, 0, 1, 4, 5]]
    turned = made(Features(swapped, mask, x.mean(1)))[0]
    assert not torch.allclose(turned.mean(1), tokens.mean(1), atol=1e-4)
    other = torch.where(mask[..., None], x, random(2, 6, 6, seed=3))
    torch.testing.assert_close(made(Features(other, mask, x.mean(1)))[0], tokens)
    with pytest.raises(UserError, match="not 3 equal parts"):
        made(Features(x[:, :5], mask[:, :5], x.mean(1)))


def test_mistakes_are_named():
    with pytest.raises(UserError, match="multiple of heads"):
        build_connector({"type": "sequence", "in_dim": 6, "out_dim": 4, "hidden_dim": 9})
