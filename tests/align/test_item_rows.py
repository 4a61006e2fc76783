"""Rows of several streams as rows of items."""

from __future__ import annotations

import torch

from mmllm.align.item_rows import item_losses, stacked_rows
from mmllm.contracts import AlignBatch, Stream


def test_rows_lie_stream_by_stream_and_know_their_items():
    a, b = torch.randn(3, 2), torch.randn(2, 2)
    batch = AlignBatch({"a": Stream(embedding=a), "b": Stream(embedding=b, owner=torch.tensor([2, 0]))})
    rows, owner = stacked_rows(batch, ["a", "b"])
    torch.testing.assert_close(rows, torch.cat([a, b]))
    assert owner.tolist() == [0, 1, 2, 2, 0]


def test_an_items_loss_is_the_mean_of_its_rows():
    out = item_losses(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 2, 2]), 4)
    assert out["loss"].tolist() == [1, 0, 3, 0] and out["valid"].tolist() == [True, False, True, False]
