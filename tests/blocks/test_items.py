"""One row for each item."""

from __future__ import annotations

import torch

from mmllm.blocks.items import item_rows


def test_means_of_owners():
    rows = torch.arange(8.0).view(4, 2).requires_grad_()
    found, there = item_rows(rows, torch.tensor([2, 0, 2, 2]), 4)
    expected = torch.stack([rows[1], torch.zeros(2), rows[[0, 2, 3]].mean(0), torch.zeros(2)])
    torch.testing.assert_close(found, expected)
    assert there.tolist() == [True, False, True, False]
    found.sum().backward()
    torch.testing.assert_close(rows.grad, torch.tensor([[1 / 3] * 2, [1.0] * 2, [1 / 3] * 2, [1 / 3] * 2]))


def test_one_row_each_is_untouched():
    rows = torch.rand(3, 2)
    found, there = item_rows(rows, None, 3)
    assert found is rows and there.all()
    empty, there = item_rows(rows[:0], torch.zeros(0, dtype=torch.long), 2)
    assert empty.tolist() == [[0, 0], [0, 0]] and not there.any()
