"""Weighted mixtures: which records of several sources an epoch has, a pure function of seed and epoch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from mmllm.errors import UserError


class Mixture:
    """Draws so many records of each source that they have its share of an epoch.

    Each source goes through its own records pass by pass, in another order each time, and an epoch goes on where the
    one before ended: over many epochs all records of a source come equally often, or once more.

    Args:
        sizes: records of each source; those of source k stand after those of the sources before it.
        weights: of each source, above 0; their sum need not be 1.
        seed: of all orders.
        first: so many records of each source, of its share, stand at the front of epoch 0.

    Attributes:
        opening: how many they are together.

    Raises:
        UserError: a source without records.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int, first: Sequence[int] = ()):
        for number, size in enumerate(sizes):
            if size < 1:
                raise UserError("a source of a mixture has no records", f"data.{number}")
        self.sizes, self.seed = list(sizes), seed
        self.starts = [sum(self.sizes[:k]) for k in range(len(sizes))]
        self.counts = shares(sum(self.sizes), weights)
        self.first = [min(n, count) for n, count in zip(first, self.counts)]
        self.opening = sum(self.first)

    def __len__(self) -> int:
        """Records of an epoch: as many as all sources have together."""
        return sum(self.sizes)

    def epoch(self, number: int) -> np.ndarray:
        """The records of an epoch in their order; one may come several times."""
        drawn = [self._drawn(k, number * n, n) for k, n in enumerate(self.counts)]
        mixed = np.random.default_rng((self.seed, number)).permutation(np.concatenate(drawn))
        if number or not self.opening:
            return mixed
        source = np.searchsorted(self.starts, mixed, side="right") - 1
        early = np.zeros(len(mixed), bool)
        for k, count in enumerate(self.first):
            early[np.flatnonzero(source == k)[:count]] = True
        return np.concatenate([mixed[early], mixed[~early]])

    def _drawn(self, source: int, start: int, count: int) -> np.ndarray:
        """``count`` records of a source's endless order from place ``start`` on."""
        size = self.sizes[source]
        passes = range(start // size, math.ceil((start + count) / size))
        order = [np.random.default_rng((self.seed, 6, source, p)).permutation(size) for p in passes]
        first = start - passes[0] * size
        return self.starts[source] + np.concatenate(order)[first : first + count]


def shares(total: int, weights: Sequence[float]) -> list[int]:
    """``total`` divided by the weights (largest remainders), at least 1 each where there is enough."""
    exact = [w * total / sum(weights) for w in weights]
    counts = [max(math.floor(x), 1) for x in exact]
    by_rest = sorted(range(len(exact)), key=lambda k: math.floor(exact[k]) - exact[k])
    for k in (by_rest * 2)[: max(total - sum(counts), 0)]:
        counts[k] += 1
    while sum(counts) > total and max(counts) > 1:
        counts[counts.index(max(counts))] -= 1
    return counts
