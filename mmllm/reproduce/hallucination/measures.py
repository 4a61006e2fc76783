"""Yes/no measures of a condition and its difference from another one, paired by question, clustered by picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from mmllm.evaluate.paired import PairedDifference, hierarchical_difference, mcnemar
from mmllm.evaluate.stats import auc, auc_interval, mean_interval
from mmllm.evaluate.tasks import Sample
from mmllm.reproduce.hallucination import questions as q

Interval = tuple[float, float, float]  # value, low, high


@dataclass
class Judged:
    """One condition's answers.

    Attributes:
        margins: [training seeds, n], log-probability of yes minus that of no.
        temperature: 0: the likelier word is the answer; above: answers are drawn.
    """

    name: str
    spec: str
    kind: str
    margins: NDArray
    temperature: float = 0.0
    note: str = ""

    def yes(self, temperature: float | None = None) -> NDArray:
        """[seeds, n]: how often yes is said: 0 or 1 at T = 0, else its probability among yes and no.

        The probability is what the mean over infinitely many decoding seeds would tend to.
        """
        t = self.temperature if temperature is None else temperature
        if not t:
            return (self.margins > 0).astype(float)
        return 1 / (1 + np.exp(-np.clip(self.margins / t, -500, 500)))


@dataclass
class Bench:
    """The questions as arrays, and every measure on them; ``clean``: things that are in no pair."""

    samples: Sequence[Sample]
    clean: frozenset[str] = frozenset()
    seed: int = 0
    gold: NDArray = field(init=False)
    clusters: NDArray = field(init=False)

    def __post_init__(self) -> None:
        self.gold = np.array([s.gold == "yes" for s in self.samples], bool)
        self.clusters = np.array([s.cluster for s in self.samples])

    def use(self, name: str) -> NDArray:
        return q.used_for(self.samples, name)

    @cached_property
    def twins(self) -> tuple[NDArray, NDArray]:
        """Indices of the questions about B on the shown and on the hidden twin, pair by pair."""
        held: dict[str, dict[str, int]] = {}
        for i, s in enumerate(self.samples):
            if q.PAIRS in s.meta["uses"]:
                held.setdefault(s.meta["pair"], {})[s.meta["twin"]] = i
        both = [(x["shown"], x["hidden"]) for x in held.values()]
        return np.array([b[0] for b in both]), np.array([b[1] for b in both])

    @cached_property
    def gaps(self) -> tuple[NDArray, NDArray]:
        """Indices of two questions per hidden twin: the B of its A, and a B whose A is not there; both absent."""
        other = {s.cluster: i for i, s in enumerate(self.samples) if q.OTHER in s.meta["uses"]}
        hidden = [int(i) for i in self.twins[1] if self.clusters[i] in other]
        return np.array(hidden, int), np.array([other[str(self.clusters[i])] for i in hidden], int)

    # ---- one value per item, [seeds, items], and the items' clusters

    def right(self, judged: Judged, use: str, temperature: float | None = None) -> tuple[NDArray, NDArray]:
        """Probability of the right word."""
        pick, yes = self.use(use), judged.yes(temperature)
        return np.where(self.gold, yes, 1 - yes)[:, pick], self.clusters[pick]

    def pairs(self, judged: Judged, temperature: float | None = None) -> tuple[NDArray, NDArray]:
        """Probability that both twins are answered right."""
        shown, hidden = self.twins
        yes = judged.yes(temperature)
        return yes[:, shown] * (1 - yes[:, hidden]), self.clusters[hidden]

    def bias(self, judged: Judged) -> tuple[NDArray, NDArray]:
        """False yes about B beside its A, minus that without its A."""
        own, other = self.gaps
        yes = judged.yes()
        return yes[:, own] - yes[:, other], self.clusters[own]

    def recall(self, judged: Judged, clean: bool = False) -> tuple[NDArray, NDArray]:
        """Yes about present things of natural scenes; ``clean``: only those in no pair."""
        pick = self.use(q.NATURAL[0]) & self.gold
        if clean:
            pick &= np.array([s.meta["object"] in self.clean for s in self.samples])
        return judged.yes()[:, pick], self.clusters[pick]

    # ---- intervals

    def mean(self, values: tuple[NDArray, NDArray]) -> Interval:
        """Over all seeds, resampling pictures."""
        items, clusters = values
        return mean_interval(items.ravel(), np.tile(clusters, len(items)), self.seed)

    def auc(self, judged: Judged, use: str) -> Interval:
        """Mean of the training seeds' AUCs; the interval is that of one seed's when there is one, else of the mean."""
        pick = self.use(use)
        if len(judged.margins) == 1:
            return auc_interval(judged.margins[0, pick], self.gold[pick], self.clusters[pick], self.seed)
        # Against constant margins, whose AUC is a half in every resample, the paired machinery gives the interval.
        gap = self.auc_gap(judged.margins, np.zeros_like(judged.margins), use)
        return gap.difference + 0.5, gap.low + 0.5, gap.high + 0.5

    # ---- differences

    def auc_gap(self, a: NDArray, b: NDArray, use: str) -> PairedDifference:
        """AUC of margins ``a`` minus that of ``b``, [seeds, n] each."""
        pick, count = self.use(use), len(a)
        return hierarchical_difference(
            a[:, pick].ravel(), b[:, pick].ravel(), np.repeat(np.arange(count), pick.sum()),
            np.tile(self.clusters[pick], count), np.tile(self.gold[pick], count), self.seed)  # fmt: skip

    def gap(self, a: tuple[NDArray, NDArray], b: tuple[NDArray, NDArray]) -> PairedDifference:
        """Mean of ``a`` minus mean of ``b``, item by item, over pictures and training seeds."""
        count, n = a[0].shape
        return hierarchical_difference(
            a[0].ravel(), b[0].ravel(), np.repeat(np.arange(count), n), np.tile(a[1], count), seed=self.seed
        )

    def mcnemar(self, a: Judged, b: Judged, use: str) -> list[tuple[int, int, float]]:
        """Per training seed: right only under a, right only under b, exact p; for answers at T = 0."""
        return [mcnemar(x > 0.5, y > 0.5) for x, y in zip(self.right(a, use)[0], self.right(b, use)[0])]


def choose(bench: Bench, tried: dict[str, NDArray], use: str = q.ADVERSARIAL) -> str:
    """The spec with the highest AUC, averaged over training seeds; the first one on a tie.

    Args:
        tried: spec -> margins [seeds, n] on dev questions.
    """
    pick = bench.use(use)
    value = {s: float(np.mean([auc(m[pick], bench.gold[pick]) for m in margins])) for s, margins in tried.items()}
    return max(value, key=lambda s: value[s])


def design_effect(differences: NDArray, clusters: NDArray) -> float:
    """How much larger the variance of the mean of ``differences`` [n] is for being clustered: 1 for independent items.

    Ratio of the cluster-robust to the ordinary variance; at least 1, since fewer than one independent item an item
    would be luck.
    """
    centred = differences - differences.mean()
    total = float((centred**2).sum())
    ids = np.unique(clusters, return_inverse=True)[1]
    return max(1.0, float((np.bincount(ids, centred) ** 2).sum()) / total) if total else 1.0
