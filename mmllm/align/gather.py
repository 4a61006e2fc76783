"""The batch of all processes, with gradients, for objectives that look at all items."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mmllm.blocks.ranks import Ranks
from mmllm.contracts import AlignBatch, Features, Stream


def gather_batch(batch: AlignBatch, ranks: Ranks, streams: Iterable[str]) -> AlignBatch:
    """Items of all processes, rank by rank; of the streams those named.

    Each process then computes the whole loss, and the gradients that come back to a process's own rows are summed over
    the processes: averaged over them they are those of one process with all items.
    """
    if ranks.size == 1:
        return batch
    sizes = _counts(len(batch), ranks, batch)
    starts = [sum(sizes[:r]) for r in range(ranks.size)]
    found = {name: _stream(batch.streams[name], ranks, starts) for name in sorted(streams)}  # alike everywhere
    texts = {k: getattr(batch, k) for k in ("ids", "labels", "groups", "languages", "boxes")}
    own = {k: v for k, v in batch.extras.items() if isinstance(v, list)}
    parts: list[Any] = [None] * ranks.size
    dist.all_gather_object(parts, (texts, own), group=ranks.group)
    joined = {k: _join([p[0][k] for p in parts]) for k in texts}
    extras = batch.extras | {k: _join([p[1][k] for p in parts]) for k in own}
    numbers = {k: gather_rows(getattr(batch, k), ranks) for k in ("items", "label_ids")}
    return dataclasses.replace(batch, streams=found, extras=extras, ranks=None, **joined, **numbers)


def gather_rows(x: Tensor | None, ranks: Ranks) -> Tensor | None:
    """[n, ...] of each process, n and all further sizes may differ -> rows of all, padded with zeros (False)."""
    if x is None or ranks.size == 1:
        return x
    shape = torch.tensor(x.shape, device=x.device)
    shapes = ranks.gather(shape[None])
    largest = shapes.amax(0).tolist()
    pad = [n for size, most in zip(reversed(x.shape), reversed(largest)) for n in (0, most - size)]
    whole = ranks.gather(F.pad(x.to(torch.uint8), pad).bool() if x.dtype == torch.bool else F.pad(x, pad))
    counts = shapes[:, 0].tolist()
    if len(set(counts)) == 1:
        return whole
    keep = torch.cat([torch.arange(n) + r * largest[0] for r, n in enumerate(counts)]).to(x.device)
    return whole[keep]


def _stream(stream: Stream, ranks: Ranks, starts: list[int]) -> Stream:
    rows = {
        f.name: gather_rows(value, ranks)
        for f in dataclasses.fields(stream)
        if isinstance(value := getattr(stream, f.name), Tensor) and f.name != "owner"
    }
    owner = stream.owner
    if owner is not None:
        owner = gather_rows(owner + starts[ranks.rank], ranks)
    features = stream.features and _features(stream.features, ranks)
    extras = {k: gather_rows(v, ranks) for k, v in stream.extras.items()}
    return dataclasses.replace(stream, **rows, owner=owner, features=features, extras=extras)


def _features(features: Features, ranks: Ranks) -> Features:
    rows = {k: gather_rows(getattr(features, k), ranks) for k in ("tokens", "mask", "pooled", "input_ids")}
    layers = features.layers and {k: gather_rows(v, ranks) for k, v in features.layers.items()}
    return dataclasses.replace(features, **rows, layers=layers)


def _counts(n: int, ranks: Ranks, batch: AlignBatch) -> list[int]:
    held = ((s.embedding, s.token_embedding, s.owner, s.features and s.features.tokens) for s in batch.streams.values())
    some = next(x for found in held for x in found if x is not None)
    return ranks.gather(torch.tensor([n], device=some.device)).tolist()


def _join(parts: list[Any]) -> Any:
    return None if any(p is None for p in parts) else [x for p in parts for x in p]
