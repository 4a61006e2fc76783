"""Encoding a big batch chunk by chunk with the memory of one chunk and the exact gradients of the whole batch.

A first pass makes the outputs of all chunks and keeps nothing else; the loss sees the whole batch; in the backward each
chunk runs a second time, with the same random draws, and takes its part of the gradient (GradCache, arXiv 2101.06983).
Everything else that the loss depends on, such as a logit scale, gets its gradient once, from the whole loss.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmllm.blocks.memory import free_memory, graph_bytes
from mmllm.blocks.replay import Moment
from mmllm.blocks.slices import even_slices

Encode = Callable[[Any], Any]
# A backward holds gradients of activations and temporaries beside the graph that it walks.
GRAPH_SHARE = 0.4


def in_chunks(encode: Encode, batch: Any, size: int | None = None) -> Any:
    """``encode(batch)`` in chunks of ``size`` items, with outputs joined along their first axis.

    The last chunk keeps its graph, so one chunk is an ordinary forward, and k chunks cost k - 1 forwards more.

    Args:
        encode: must give the same for the same input and the same random state (torch, numpy, ``random``). State that
            it changes, such as the running mean of a BatchNorm, is changed twice.
        batch: tensors and lists with one entry per item are cut, dicts, tuples and dataclasses are entered, all else
            goes whole to each chunk.
        size: items per chunk; None asks ``chunk_size``, which encodes two items more. A training does that once, since
            other chunks draw other random numbers.

    Returns:
        What ``encode`` returns: tensors and lists with one entry per item, in any nesting of dicts, tuples and
        dataclasses; of anything else, what the last chunk gave. Parameters get their gradients from it as usual.
        ``DistributedDataParallel`` may stand around the caller, but not within ``encode``.

    Raises:
        ValueError: the batch needs a gradient, which it would not get, or ``encode`` gives a scalar that does.
    """
    if any(x.requires_grad for x in tensors_in(batch)):
        raise ValueError("a tensor of the batch needs a gradient; give in_chunks what it is made of")
    if not torch.is_grad_enabled():
        return join([encode(part) for part in split_batch(batch, size or count_items(batch))])
    parts = list(split_batch(batch, size or chunk_size(encode, batch)))
    if len(parts) == 1:
        return encode(parts[0])
    moments, outputs = [], []
    for k, part in enumerate(parts):
        moments.append(Moment())
        with torch.set_grad_enabled(k == len(parts) - 1):
            outputs.append(encode(part))
    wanted = [k for k, x in enumerate(tensors_in(outputs[-1])) if x.requires_grad]
    chunks = _Chunks(encode, parts, moments, outputs, wanted)
    joined = join([map_leaves(detached, x) for x in outputs])
    if not wanted:
        return joined
    values = [tensors_in(joined)[k] for k in wanted]
    made = dict(zip(wanted, _InChunks.apply(chunks, values, *leaves_of(chunks.kept))))  # pyright: ignore
    numbered = iter(range(len(tensors_in(joined))))
    return map_leaves(lambda x: made.get(next(numbered), x) if isinstance(x, Tensor) else x, joined)


class _Chunks:
    """The chunks of one batch, to be run again: from gradients of the joined outputs to those of the leaves."""

    def __init__(self, encode: Encode, parts: list[Any], moments: list[Moment], outputs: list[Any], wanted: list[int]):
        self.encode, self.parts, self.moments, self.wanted = encode, parts, moments, wanted
        found = [[tensors_in(x)[k] for k in wanted] for x in outputs]
        if any(x.dim() == 0 for x in found[-1]):
            raise ValueError("encode gave a scalar that needs a gradient; chunks can only be joined item by item")
        self.lengths = [[len(x) for x in chunk] for chunk in found]
        self.kept: list[Tensor] | None = found[-1]

    def run(self, k: int) -> list[Tensor]:
        """The outputs of chunk k with their graph."""
        if k == len(self.parts) - 1 and self.kept is not None:
            kept, self.kept = self.kept, None
            return kept
        with self.moments[k].again(), torch.enable_grad():
            found = tensors_in(self.encode(self.parts[k]))
        return [found[n] for n in self.wanted]

    def gradients(self, grads: tuple[Tensor | None, ...], leaves: tuple[Tensor, ...]) -> list[Tensor | None]:
        """Gradients of the leaves, summed over the chunks, the last chunk first."""
        ends = [None if g is None else len(g) for g in grads]
        sums: list[Tensor | None] = [None] * len(leaves)
        for k in reversed(range(len(self.parts))):
            outs, theirs = [], []
            for n, out in enumerate(self.run(k)):
                end, grad = ends[n], grads[n]
                if grad is not None and end is not None:
                    ends[n] = end - self.lengths[k][n]
                    outs.append(out)
                    theirs.append(grad[ends[n] : end])
            if not outs:
                continue
            found = list(torch.autograd.grad(outs, leaves, theirs, allow_unused=True))
            del outs, out
            for n in reversed(range(len(sums))):  # one by one, so that no third copy of the gradients stands beside
                new, old = found.pop(), sums[n]
                sums[n] = old if new is None else new if old is None else old + new
            del new, old
        return sums


class _InChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, chunks: _Chunks, values: list[Tensor], *leaves: Tensor) -> tuple[Tensor, ...]:
        ctx.chunks = chunks
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*leaves)
        return tuple(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.chunks.gradients(grads, ctx.saved_tensors)


def leaves_of(outputs: list[Tensor]) -> list[Tensor]:
    """The parameters and other leaves that a graph leads to."""
    found: dict[int, Tensor] = {id(x): x for x in outputs if x.is_leaf}
    waiting = [x.grad_fn for x in outputs if x.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            found[id(leaf)] = leaf
        new = {after for after, _ in node.next_functions if after is not None} - seen
        seen |= new
        waiting += new
    return list(found.values())


def map_leaves(fn: Callable[..., Any], *things: Any) -> Any:
    """``fn`` on what stands in the same place in each, where dicts, tuples and dataclasses are entered."""
    first = things[0]
    if isinstance(first, dict):
        return {k: map_leaves(fn, *(x[k] for x in things)) for k in first}
    if isinstance(first, tuple):
        return tuple(map_leaves(fn, *parts) for parts in zip(*things))
    if dataclasses.is_dataclass(first) and not isinstance(first, type):
        names = [f.name for f in dataclasses.fields(first)]
        return dataclasses.replace(first, **{k: map_leaves(fn, *(getattr(x, k) for x in things)) for k in names})
    return fn(*things)


def tensors_in(thing: Any) -> list[Tensor]:
    """The tensors of a nesting, in order."""
    found: list[Tensor] = []
    map_leaves(lambda x: found.append(x) if isinstance(x, Tensor) else None, thing)
    return found


def detached(x: Any) -> Any:
    return x.detach() if isinstance(x, Tensor) else x


def join(parts: list[Any]) -> Any:
    """Outputs of chunks as one, see ``in_chunks``."""

    def one(*pieces: Any) -> Any:
        if isinstance(pieces[0], Tensor) and pieces[0].dim():
            return torch.cat(pieces)
        return [x for p in pieces for x in p] if isinstance(pieces[0], list) else pieces[-1]

    return parts[0] if len(parts) == 1 else map_leaves(one, *parts)


def _per_item(x: Any) -> bool:
    return isinstance(x, list) or (isinstance(x, Tensor) and x.dim() > 0)


def count_items(batch: Any) -> int:
    """Length of the first tensor or list of a batch.

    Raises:
        ValueError: there is none.
    """
    lengths: list[int] = []
    map_leaves(lambda x: lengths.append(len(x)) if _per_item(x) else None, batch)
    if not lengths:
        raise ValueError("no tensor and no list in the batch")
    return lengths[0]


def split_batch(batch: Any, size: int) -> Iterator[Any]:
    """The chunks of a batch, of nearly equal length, none longer than ``size``; see ``in_chunks``."""
    n = count_items(batch)
    for at in even_slices(n, size):
        yield map_leaves(lambda x, at=at: x[at] if _per_item(x) and len(x) == n else x, batch)


def chunk_size(encode: Encode, batch: Any, memory: int | None = None, probe: int = 2) -> int:
    """Items per chunk, for chunks of equal length that fit in memory; found by encoding the first items.

    Args:
        memory: bytes; None takes what is free on the device of the batch.
        probe: how many items are tried.
    """
    n = count_items(batch)
    first = next(split_batch(batch, min(probe, n)))
    tensors = tensors_in(batch)
    before = Moment()
    each = graph_bytes(lambda: encode(first), apart=tensors) / count_items(first)
    before.set_random()
    if memory is None:
        memory = free_memory(tensors[0].device if tensors else torch.device("cpu"))
    fit = max(1, int(memory * GRAPH_SHARE / max(each, 1)))
    return math.ceil(n / math.ceil(n / fit))
