"""Rows of several streams under one another, and their losses as losses of items: for losses within a set of views."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmllm.contracts import AlignBatch


def stacked_rows(batch: AlignBatch, streams: Sequence[str]) -> tuple[Tensor, Tensor]:
    """The embeddings of all streams, stream by stream: [R, P], and the item that each row belongs to, [R] long."""
    rows, owners = [], []
    for name in streams:
        stream = batch.streams[name]
        assert stream.embedding is not None
        own = torch.arange(len(stream.embedding)) if stream.owner is None else stream.owner
        rows.append(stream.embedding)
        owners.append(own.to(stream.embedding.device))
    return torch.cat(rows), torch.cat(owners)


def item_losses(values: Tensor, owner: Tensor, size: int) -> dict[str, Tensor]:
    """Losses of rows [R] as those of items: the mean over each item's rows; items without a row are not valid.

    Returns:
        ``loss`` [size] and ``valid`` [size] bool, as an objective gives them.
    """
    count = torch.bincount(owner, minlength=size)
    total = values.new_zeros(size).index_add(0, owner, values)
    return {"loss": total / count.clamp(min=1), "valid": count > 0}
