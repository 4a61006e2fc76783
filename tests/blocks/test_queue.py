"""The last rows pushed, whatever the sizes of the pushes, with their numbers, and the same after a checkpoint."""

from __future__ import annotations

import pytest
import torch

from mmllm.blocks.queue import FeatureQueue


def rows(*values):
    return torch.tensor(values, dtype=torch.float)[:, None].expand(-1, 2)


@pytest.mark.parametrize("sizes", [(1, 2), (3, 2, 4), (5, 5), (2, 5, 1, 3), (7,), (2, 12, 1), (0, 3)])
def test_holds_the_last_rows_with_their_numbers(sizes):
    queue, pushed = FeatureQueue(5, 2, names=True), []
    for size in sizes:
        new = list(range(len(pushed), len(pushed) + size))
        queue.push(rows(*new) if new else torch.empty(0, 2), torch.tensor(new, dtype=torch.long) + 100)
        pushed += new
        assert len(queue) == len(queue.content()) == min(5, len(pushed))
        assert sorted(queue.content()[:, 0].tolist()) == pushed[-5:]
        torch.testing.assert_close(queue.content()[:, 1], queue.content()[:, 0])
        assert torch.equal(queue.content_numbers(), queue.content()[:, 0].long() + 100)


def test_is_empty_at_first_and_a_content_is_a_copy():
    queue = FeatureQueue(3, 2)
    assert len(queue) == 0 and queue.content().shape == (0, 2)
    x = rows(1.0, 2.0).clone().requires_grad_()
    queue.push(x)
    held = queue.content()
    queue.push(rows(3.0, 4.0))
    assert not held.requires_grad and held[:, 0].tolist() == [1.0, 2.0]
    assert list(queue.parameters()) == []


def test_goes_on_after_a_checkpoint():
    first, again = FeatureQueue(4, 2, names=True), FeatureQueue(4, 2, names=True)
    first.push(rows(*range(6)), torch.arange(6))
    again.load_state_dict(first.state_dict())
    for queue in (first, again):
        queue.push(rows(6.0), torch.tensor([6]))
    assert len(again) == 4 and torch.equal(again.content(), first.content())
    assert sorted(again.content_numbers().tolist()) == [3, 4, 5, 6]


def test_a_queue_with_numbers_takes_no_rows_without_them():
    queue = FeatureQueue(2, 2, names=True)
    queue.push(rows(1.0, 2.0), torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="number"):
        queue.push(rows(3.0))
    with pytest.raises(ValueError, match="0 rows"):
        FeatureQueue(0, 2)
