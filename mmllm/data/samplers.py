"""Which items make up a batch: pure functions of the seed and the step, by id, label, group or number.

A sampler is built as ``SAMPLER(keys, batch_size, seed, **options)``: ``keys`` has one entry per item (its label, group
or cluster; its number for a label window), ``batch_size`` counts the items of all processes together, and the seed is a
number or several. Others join by ``@register("batch_sampler", NAME)``.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from mmllm.contracts import BatchSampler
from mmllm.errors import UserError
from mmllm.registry import register

Seed = int | tuple[int, ...]


class KeyedSampler(BatchSampler):
    """What the samplers share: the items of each key, and a generator for each step."""

    def __init__(self, keys: Sequence[Hashable], batch_size: int, seed: Seed = 0):
        if batch_size < 1 or not len(keys):
            raise ValueError(f"a batch of {batch_size} of {len(keys)} items")
        self.size, self.batch_size = len(keys), batch_size
        self.seed = (seed,) if isinstance(seed, int) else tuple(seed)
        self.members: dict[Hashable, list[int]] = {}
        for item, key in enumerate(keys):
            self.members.setdefault(key, []).append(item)
        self.names = sorted(self.members, key=str)

    def rng(self, *numbers: int) -> np.random.Generator:
        """The generator of a step (of an epoch, a cluster...)."""
        return np.random.default_rng((*self.seed, *numbers))

    def draw(self, key: Hashable, count: int, rng: np.random.Generator) -> list[int]:
        """``count`` items of a key, all different unless the key has fewer."""
        held = self.members[key]
        return [held[i] for i in rng.choice(len(held), count, replace=count > len(held))]


@register("batch_sampler", "random")
class RandomItems(KeyedSampler):
    """Items at random, each batch anew; all different unless the batch is larger than the data."""

    def indices(self, step: int) -> list[int]:
        return self.rng(step).choice(self.size, self.batch_size, replace=self.batch_size > self.size).tolist()


@register("batch_sampler", "shuffle")
class ShuffledItems(KeyedSampler):
    """Epoch after epoch in a new order: every item once before any comes twice; batches go over the epochs' ends."""

    def indices(self, step: int) -> list[int]:
        first = step * self.batch_size
        places = np.arange(first, first + self.batch_size)
        out = np.empty(self.batch_size, dtype=int)
        for epoch in np.unique(places // self.size):
            here = places // self.size == epoch
            out[here] = self.order(int(epoch))[places[here] % self.size]
        return out.tolist()

    def order(self, epoch: int) -> np.ndarray:
        """The permutation of an epoch; the last one is kept, as the next step most likely wants it again."""
        held = getattr(self, "_held", None)
        if held is None or held[0] != epoch:
            self._held = held = (epoch, self.rng(epoch).permutation(self.size))
        return held[1]


@register("batch_sampler", "distinct")
class DistinctKeys(KeyedSampler):
    """Different keys at random, one item of each; a batch has at most as many items as there are keys."""

    def indices(self, step: int) -> list[int]:
        rng = self.rng(step)
        picked = rng.choice(len(self.names), min(self.batch_size, len(self.names)), replace=False)
        held = [self.members[self.names[k]] for k in picked]
        return [int(v[rng.integers(len(v))]) for v in held]


@register("batch_sampler", "k_per_group")
class KPerGroup(KeyedSampler):
    """``batch_size / k`` different keys at random and k items of each (views, languages, pictures of one person).

    Args:
        k: items of each key; of a key that has fewer, items come twice.

    Raises:
        UserError: the batch is no multiple of k, or there are too few keys.
    """

    def __init__(self, keys: Sequence[Hashable], batch_size: int, seed: Seed = 0, k: int = 2):
        super().__init__(keys, batch_size, seed)
        self.k = k
        if k < 1 or batch_size % k:
            raise UserError(f"a batch of {batch_size} is no multiple of k = {k}", "sampler k_per_group")
        if batch_size // k > len(self.names):
            what = f"a batch of {batch_size} needs {batch_size // k} groups, and there are {len(self.names)}"
            raise UserError(what, "sampler k_per_group", "lower the batch size or raise k")

    def indices(self, step: int) -> list[int]:
        rng = self.rng(step)
        picked = rng.choice(len(self.names), self.batch_size // self.k, replace=False)
        return [i for p in picked for i in self.draw(self.names[p], self.k, rng)]


@register("batch_sampler", "balanced")
class Balanced(KeyedSampler):
    """All keys equally often, however many items they have: counts in a batch differ by one at most."""

    def indices(self, step: int) -> list[int]:
        rng = self.rng(step)
        each, more = divmod(self.batch_size, len(self.names))
        extra = set(rng.choice(len(self.names), more, replace=False).tolist())
        chosen = [i for n, name in enumerate(self.names) for i in self.draw(name, each + (n in extra), rng)]
        return [chosen[i] for i in rng.permutation(len(chosen))]


@register("batch_sampler", "one_cluster")
class OneCluster(KeyedSampler):
    """Every batch from one cluster, so that what tells clusters apart cannot help (arXiv 2402.11816).

    Each epoch every cluster is shuffled and cut into full batches, and these come in random order. What does not fill a
    batch is left out of the epoch, as are clusters smaller than a batch.

    Raises:
        UserError: no cluster fills a batch.
    """

    def __init__(self, keys: Sequence[Hashable], batch_size: int, seed: Seed = 0):
        super().__init__(keys, batch_size, seed)
        self.schedule = [(name, i) for name in self.names for i in range(len(self.members[name]) // batch_size)]
        if not self.schedule:
            largest = max(len(v) for v in self.members.values())
            what = f"no cluster fills a batch of {batch_size}; the largest has {largest} items"
            raise UserError(what, "sampler one_cluster", "lower the batch size or make fewer clusters")

    def indices(self, step: int) -> list[int]:
        epoch, place = divmod(step, len(self.schedule))
        name, part = self.schedule[self.rng(epoch).permutation(len(self.schedule))[place]]
        held = self.members[name]
        order = self.rng(epoch, self.names.index(name)).permutation(len(held))
        return [held[i] for i in order[part * self.batch_size : (part + 1) * self.batch_size]]


@register("batch_sampler", "label_window")
class LabelWindow(KeyedSampler):
    """Items whose number lies within ``window`` of a random item's (ages, lengths, sizes).

    Where fewer lie within it, the nearest ones beyond fill the batch.

    Raises:
        UserError: keys that are no numbers, or a batch larger than the data.
    """

    def __init__(self, keys: Sequence[Hashable], batch_size: int, seed: Seed = 0, window: float = 1.0):
        super().__init__(keys, batch_size, seed)
        try:
            self.values = np.array([float(k) for k in keys])  # type: ignore[arg-type]
        except (TypeError, ValueError) as e:
            raise UserError(f"labels must be numbers ({e})", "sampler label_window") from None
        self.window = float(window)
        if batch_size > self.size:
            raise UserError(f"a batch of {batch_size} is larger than the {self.size} items", "sampler label_window")

    def indices(self, step: int) -> list[int]:
        rng = self.rng(step)
        distance = np.abs(self.values - self.values[rng.integers(self.size)])
        near = np.flatnonzero(distance <= self.window)
        if len(near) < self.batch_size:
            near = np.argsort(distance, kind="stable")[: self.batch_size]
        return near[rng.permutation(len(near))[: self.batch_size]].tolist()
