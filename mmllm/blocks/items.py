"""One row for each item of a batch, where a stream has none or several for some (missing media, several captions)."""

from __future__ import annotations

import torch
from torch import Tensor


def item_rows(rows: Tensor, owner: Tensor | None, size: int) -> tuple[Tensor, Tensor]:
    """The mean row of each item, [size, ...], zero where it has none, and whether it has one, [size] bool.

    Args:
        rows: [R, ...].
        owner: [R] item of each row, as in ``Stream.owner``; None: row i is item i.
    """
    if owner is None:
        return rows, torch.ones(len(rows), dtype=torch.bool, device=rows.device)
    count = torch.bincount(owner, minlength=size)
    total = rows.new_zeros(size, *rows.shape[1:]).index_add(0, owner, rows)
    share = count.clamp(min=1).to(rows.dtype).view(-1, *[1] * (rows.dim() - 1))
    return total / share, count > 0
