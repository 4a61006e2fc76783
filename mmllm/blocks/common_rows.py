"""The items of a batch that have all of several streams, one row for each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmllm.contracts import AlignBatch


def common_rows(batch: AlignBatch, streams: Sequence[str]) -> tuple[dict[str, Tensor], Tensor]:
    """The first row of each item that has all of the streams, by stream, and the numbers of these items."""
    first, size = {}, len(batch)
    device = torch.device("cpu")
    for name in streams:
        stream = batch.streams[name]
        some = stream.embedding if stream.embedding is not None else stream.token_embedding
        device = stream.features.pooled.device if some is None and stream.features is not None else some.device  # type: ignore[union-attr]
        owner = torch.arange(size) if stream.owner is None else stream.owner.cpu()
        found = torch.full((size,), -1)
        found[owner.flip(0)] = torch.arange(len(owner)).flip(0)
        first[name] = found
    items = torch.stack(list(first.values())).ge(0).all(0).nonzero().flatten()
    return {k: v[items].to(device) for k, v in first.items()}, items.to(device)
