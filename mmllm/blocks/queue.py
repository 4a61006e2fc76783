"""A queue of the last features as further negatives (MoCo, arXiv 1911.05722); its content is kept in checkpoints."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmllm.blocks.ranks import Ranks


class FeatureQueue(nn.Module):
    """The last ``size`` rows that were pushed, oldest overwritten first.

    Args:
        size: rows that it holds.
        dim: their width.
        names: also keeps an int64 number with each row (its label, its item).
    """

    rows: Tensor
    numbers: Tensor
    pushed: Tensor

    def __init__(self, size: int, dim: int, names: bool = False):
        super().__init__()
        if size < 1:
            raise ValueError(f"a queue of {size} rows")
        self.size = size
        self.register_buffer("rows", torch.zeros(size, dim))
        self.register_buffer("numbers", torch.full((size if names else 0,), -1, dtype=torch.long))
        self.register_buffer("pushed", torch.zeros((), dtype=torch.long))

    def __len__(self) -> int:
        """Rows that have been filled."""
        return min(int(self.pushed), self.size)

    def content(self) -> Tensor:
        """[len, dim], in no particular order, without gradient."""
        return self.rows[: len(self)].clone()

    def content_numbers(self) -> Tensor:
        """[len] int64 of ``content``."""
        return self.numbers[: len(self)].clone()

    @torch.no_grad()
    def push(self, rows: Tensor, numbers: Tensor | None = None, ranks: Ranks | None = None) -> None:
        """Adds rows [n, dim]; with ``ranks`` those of all processes, so that every process has the same queue.

        Raises:
            ValueError: a queue with ``names`` is given rows without numbers.
        """
        if len(self.numbers) and numbers is None:
            raise ValueError("this queue keeps a number with each row, and none were given")
        if ranks is not None:
            rows = ranks.gather(rows.detach())
            numbers = ranks.gather(numbers) if numbers is not None else None
        rows = rows.detach()[-self.size :]
        at = (int(self.pushed) + torch.arange(len(rows), device=self.rows.device)) % self.size
        self.rows[at] = rows.to(self.rows)
        if len(self.numbers) and numbers is not None:
            self.numbers[at] = numbers[-self.size :].to(self.numbers)
        self.pushed += len(rows)
