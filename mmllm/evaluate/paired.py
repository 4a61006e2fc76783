"""Is A better than B on the same items? Exact and resampling tests, intervals, Holm correction and verdicts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import bdtr, stdtr, stdtrit

from mmllm.evaluate.stats import (
    LEVEL,
    RESAMPLES,
    auc,
    cluster_indices,
    percentile_bounds,
    ratio_gain_interval,
    resampled_auc,
    resampled_weights,
)

ALPHA = 0.05
FLIPS = 10_000
# Up to this many clusters all sign patterns are gone through instead of drawn.
EXACT_CLUSTERS = 12
FLIP_PORTION = 1000


class PairedDifference(NamedTuple):
    """A minus B, the bounds of its 95 % interval, and the two-sided p of no difference."""

    difference: float
    low: float
    high: float
    p: float


UNKNOWN = PairedDifference(math.nan, math.nan, math.nan, math.nan)


def _columns(*columns: ArrayLike) -> list[NDArray]:
    arrays = [np.asarray(c, float) for c in columns]
    if len({x.shape for x in arrays}) > 1:
        raise ValueError(f"columns of different lengths: {[x.shape for x in arrays]}")
    return arrays


def _weighted_columns(
    a: ArrayLike, b: ArrayLike, weights_a: ArrayLike | None, weights_b: ArrayLike | None
) -> list[NDArray]:
    ones = np.ones(np.shape(a))
    return _columns(a, b, ones if weights_a is None else weights_a, ones if weights_b is None else weights_b)


def mcnemar_exact(only_a: int, only_b: int) -> float:
    """Two-sided p of the exact McNemar test: the items that only one side has right are tosses of a fair coin.

    Args:
        only_a, only_b: the discordant counts, often called b and c.
    """
    return float(min(1.0, 2 * bdtr(min(only_a, only_b), only_a + only_b, 0.5)))


def mcnemar(right_a: ArrayLike, right_b: ArrayLike) -> tuple[int, int, float]:
    """(right only in A, right only in B, exact p) of paired booleans [n].

    The items count as independent; where several share a picture, :func:`sign_flip_test` is the one to believe.
    """
    a, b = (x.astype(bool) for x in _columns(right_a, right_b))
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    return only_a, only_b, mcnemar_exact(only_a, only_b)


def sign_flip_test(
    a: ArrayLike,
    b: ArrayLike,
    clusters: ArrayLike | None = None,
    weights_a: ArrayLike | None = None,
    weights_b: ArrayLike | None = None,
    seed: int = 0,
    flips: int = FLIPS,
) -> float:
    """Two-sided permutation p of sum(a) / sum(weights_a) = sum(b) / sum(weights_b); plain means without weights.

    Without a difference A and B could change places in any cluster. Doing so flips the sign of the cluster's
    difference. With at most ``EXACT_CLUSTERS`` clusters that differ at all, every pattern is counted and p is exact;
    otherwise p is (1 + at least as extreme) / (1 + flips), which never says 0. Empty input gives NaN.

    Args:
        a, b, weights_a, weights_b: [n], item by item.
        clusters: [n] ids; None makes every item its own cluster.
    """
    a, b, weights_a, weights_b = _weighted_columns(a, b, weights_a, weights_b)
    totals = a.sum(), weights_a.sum(), b.sum(), weights_b.sum()
    if not len(a) or totals[1] == 0 or totals[3] == 0:
        return math.nan
    ids = cluster_indices(clusters, len(a))
    gap, weight_gap = np.bincount(ids, a - b), np.bincount(ids, weights_a - weights_b)
    differs = (gap != 0) | (weight_gap != 0)
    gap, weight_gap = gap[differs], weight_gap[differs]
    observed = abs(totals[0] / totals[1] - totals[2] / totals[3])
    # Equally extreme patterns may differ in the last bits.
    bar = observed - 1e-12 * (np.abs(a).sum() / totals[1] + np.abs(b).sum() / totals[3])

    def extreme(swaps: NDArray) -> int:
        top, bottom = swaps @ gap, swaps @ weight_gap
        with np.errstate(divide="ignore", invalid="ignore"):
            values = (totals[0] - top) / (totals[1] - bottom) - (totals[2] + top) / (totals[3] + bottom)
        return int((~(np.abs(values) < bar)).sum())

    if len(gap) <= EXACT_CLUSTERS:
        patterns = (np.arange(2 ** len(gap))[:, None] >> np.arange(len(gap))) & 1
        return extreme(patterns) / len(patterns)
    rng, count = np.random.default_rng(seed), 0
    for start in range(0, flips, FLIP_PORTION):
        count += extreme(rng.integers(0, 2, (min(FLIP_PORTION, flips - start), len(gap)), dtype=np.int8))
    return (1 + count) / (1 + flips)


def _bootstrap_p(differences: NDArray, clusters: int) -> float:
    """Twice the smaller share of resamples on one side of 0, so that p <= 0.05 where the 95 % interval leaves 0 out.

    Never below 2^(1 - clusters), the least that a sign flip of so few clusters could say: the bootstrap of a handful
    of clusters is far too sure.
    """
    values = differences[np.isfinite(differences)]
    if not len(values):
        return math.nan
    tail = 1 + min(int((values <= 0).sum()), int((values >= 0).sum()))
    return max(min(1.0, 2 * tail / (len(values) + 1)), 2.0 ** (1 - clusters))


def accuracy_difference(
    a: ArrayLike,
    b: ArrayLike,
    clusters: ArrayLike | None = None,
    weights_a: ArrayLike | None = None,
    weights_b: ArrayLike | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
    flips: int = FLIPS,
) -> PairedDifference:
    """sum(a) / sum(weights_a) - sum(b) / sum(weights_b), bootstrap over clusters, p by :func:`sign_flip_test`.

    Args:
        a, b: [n], hits of the same items (0/1, or counts with their weights).
        weights_a, weights_b: [n]; ones when absent.
        clusters: [n] ids; None makes every item its own cluster.
    """
    a, b, weights_a, weights_b = _weighted_columns(a, b, weights_a, weights_b)
    interval = ratio_gain_interval(a, weights_a, b, weights_b, clusters, seed, resamples)
    return PairedDifference(*interval, sign_flip_test(a, b, clusters, weights_a, weights_b, seed, flips))


def auc_difference(
    margins_a: ArrayLike,
    margins_b: ArrayLike,
    labels: ArrayLike,
    clusters: ArrayLike | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> PairedDifference:
    """AUC of A minus AUC of B over the same items, both from the same resamples of clusters.

    A constant added to one side's margins (a leaning to yes) changes nothing. NaN when a class of labels is empty.

    Args:
        margins_a, margins_b: [n], such as log-probability of yes minus that of no; the scales need not be alike.
        labels: [n] bool.
        clusters: [n] ids; None makes every item its own cluster.
    """
    a, b, labels = _columns(margins_a, margins_b, labels)
    truth = labels.astype(bool)
    if not truth.any() or truth.all():
        return UNKNOWN
    ids, draws = resampled_weights(clusters, len(a), resamples, seed)
    gaps = resampled_auc(a, truth, ids, draws) - resampled_auc(b, truth, ids, draws)
    return PairedDifference(auc(a, truth) - auc(b, truth), *percentile_bounds(gaps), _bootstrap_p(gaps, draws.shape[1]))


def hierarchical_difference(
    a: ArrayLike,
    b: ArrayLike,
    seeds: ArrayLike,
    clusters: ArrayLike | None = None,
    labels: ArrayLike | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> PairedDifference:
    """A minus B averaged over training seeds, by a bootstrap that draws training seeds and clusters.

    The seeds are judged on the same pictures, so one draw of pictures serves all drawn seeds (crossed factors, Owen
    2007, "The pigeonhole bootstrap"); drawing anew within each seed would take one sample of pictures for several.
    The spread of drawn seeds is stretched by sqrt(S / (S - 1)) so that few seeds do not understate their own variance
    (Rao and Wu 1988). With S < 5 and seeds that differ more than pictures do, it is still too narrow: show
    :func:`paired_t` over seeds beside it. One seed leaves the interval over clusters alone.

    Args:
        a, b: [n] hits, or margins when ``labels`` is given; the items of all seeds below one another.
        seeds: [n] ids of the training seed.
        clusters: [n] ids of the picture, the same id under every seed.
        labels: [n] bool; with them the difference is that of AUCs, without them that of means.
    """
    a, b = _columns(a, b)
    if not len(a):
        return UNKNOWN
    ids, draws = resampled_weights(clusters, len(a), resamples, seed)
    truth = None if labels is None else np.asarray(labels, bool)
    of_seed = cluster_indices(seeds, len(a))
    count = int(of_seed.max()) + 1
    values, resampled = np.empty(count), np.empty((count, resamples))
    for s in range(count):
        own = of_seed == s
        if truth is None:
            shares = [draws @ np.bincount(ids[own], w, draws.shape[1]) for w in ((a - b)[own], np.ones(own.sum()))]
            with np.errstate(invalid="ignore"):
                values[s], resampled[s] = (a - b)[own].mean(), shares[0] / shares[1]
        else:
            sides = [resampled_auc(x[own], truth[own], ids[own], draws) for x in (a, b)]
            values[s], resampled[s] = auc(a[own], truth[own]) - auc(b[own], truth[own]), sides[0] - sides[1]
    drawn = np.random.default_rng((seed, 1)).multinomial(count, np.full(count, 1 / count), size=resamples).T
    stretch = math.sqrt(count / (count - 1)) if count > 1 else 0.0
    gaps = resampled.mean(0) + stretch * ((drawn - 1) / count * resampled).sum(0)
    return PairedDifference(float(values.mean()), *percentile_bounds(gaps), _bootstrap_p(gaps, draws.shape[1]))


def paired_t(a: ArrayLike, b: ArrayLike, level: float = LEVEL) -> PairedDifference:
    """Mean of a - b over training seeds with its t interval and two-sided p; one seed gives NaN bounds and p.

    Args:
        a, b: [seeds], one value per seed of either arm.
    """
    a, b = _columns(a, b)
    gaps = a - b
    n = len(gaps)
    if n < 2:
        return PairedDifference(float(gaps[0]) if n else math.nan, math.nan, math.nan, math.nan)
    mean, error = float(gaps.mean()), float(gaps.std(ddof=1)) / math.sqrt(n)
    half = float(stdtrit(n - 1, (1 + level) / 2)) * error
    ratio = abs(mean) / error if error else (math.inf if mean else 0.0)
    return PairedDifference(mean, mean - half, mean + half, float(2 * stdtr(n - 1, -ratio)))


def holm(p_values: Iterable[float]) -> list[float]:
    """Adjusted p values in the given order (Holm 1979), at most 1; a NaN stays and does not count as a test."""
    p = np.asarray(list(p_values), float)
    order = np.argsort(p, kind="stable")[: int((~np.isnan(p)).sum())]
    out = np.full(len(p), math.nan)
    out[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)), 1.0)
    return out.tolist()


@dataclass(frozen=True)
class Comparison:
    """One line of a comparison of A and B over the same items.

    Attributes:
        n: items; clusters: what the interval draws as a whole.
        difference: A minus B; low, high: its 95 % interval.
        p: two-sided, clusters kept whole; p_adjusted: after Holm over the lines of the comparison.
        mcnemar: exact p with every item counted as independent, where hits are 0/1.
        better: "higher" or "lower" values are the better ones.
    """

    name: str
    n: int
    clusters: int
    value_a: float
    value_b: float
    difference: float
    low: float
    high: float
    p: float
    p_adjusted: float
    mcnemar: float | None = None
    better: str = "higher"

    @property
    def verdict(self) -> str:
        """ "a better" or "b better" if adjusted p <= 0.05 and the interval leaves 0 out, else "within noise"."""
        if not (self.p_adjusted <= ALPHA and (self.low > 0 or self.high < 0)):
            return "within noise"
        return "a better" if (self.difference > 0) == (self.better == "higher") else "b better"

    def to_dict(self) -> dict[str, Any]:
        """All fields and the verdict, None for what could not be computed (NaN is not JSON)."""
        row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(self).items()}
        return row | {"verdict": self.verdict}


def compare_rows(
    name: str,
    a: ArrayLike,
    b: ArrayLike,
    clusters: ArrayLike | None = None,
    weights_a: ArrayLike | None = None,
    weights_b: ArrayLike | None = None,
    better: str = "higher",
    seed: int = 0,
    resamples: int = RESAMPLES,
    flips: int = FLIPS,
) -> Comparison:
    """Compares accuracies (0/1 hits) or pooled ratios (hits with weights) of the same items.

    ``p`` is :func:`sign_flip_test`; where every item is its own cluster and hits are 0/1 that test is McNemar's, whose
    exact p then stands there. Arguments as in :func:`accuracy_difference`.
    """
    a, b, weights_a, weights_b = _weighted_columns(a, b, weights_a, weights_b)
    gap = accuracy_difference(a, b, clusters, weights_a, weights_b, seed, resamples, flips)
    n, count = len(a), len(set(cluster_indices(clusters, len(a)).tolist()))
    exact = None
    if n and np.isin(np.r_[a, b], (0, 1)).all() and (np.r_[weights_a, weights_b] == 1).all():
        exact = mcnemar(a, b)[2]
    p = exact if exact is not None and count == n else gap.p
    with np.errstate(divide="ignore", invalid="ignore"):
        value_a, value_b = float(a.sum() / weights_a.sum()), float(b.sum() / weights_b.sum())
    return Comparison(name, n, count, value_a, value_b, *gap[:3], p, p, exact, better)


def compare_aucs(
    name: str,
    margins_a: ArrayLike,
    margins_b: ArrayLike,
    labels: ArrayLike,
    clusters: ArrayLike | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Comparison:
    """Compares the AUCs of two margins over the same items; arguments as in :func:`auc_difference`."""
    gap = auc_difference(margins_a, margins_b, labels, clusters, seed, resamples)
    n = len(np.asarray(labels))
    count = len(set(cluster_indices(clusters, n).tolist()))
    return Comparison(name, n, count, auc(margins_a, labels), auc(margins_b, labels), *gap, gap.p)


def holm_adjusted(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """The same comparisons with ``p_adjusted`` by Holm over all of them."""
    adjusted = holm(c.p for c in comparisons)
    return [replace(c, p_adjusted=p) for c, p in zip(comparisons, adjusted, strict=True)]
