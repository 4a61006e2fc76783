"""Intervals and rank statistics that every figure of an evaluation shares: cluster bootstrap, AUC, derangements."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 2000
LEVEL = 0.95
# AUCs of resamples are computed in portions of about this many weights, so that memory stays flat.
PORTION = 2**21


def cluster_indices(clusters: ArrayLike | None, n: int) -> NDArray:
    """Index of each item's cluster, 0 .. clusters - 1, in the order of the sorted ids; [n].

    Args:
        clusters: [n] ids; None makes every item its own cluster.

    Raises:
        ValueError: not ``n`` ids.
    """
    ids = np.arange(n) if clusters is None else np.unique(np.asarray(clusters), return_inverse=True)[1].reshape(-1)
    if len(ids) != n:
        raise ValueError(f"{len(ids)} cluster ids for {n} values")
    return ids


def resampled_weights(clusters: ArrayLike | None, n: int, resamples: int, seed: int) -> tuple[NDArray, NDArray]:
    """(index of each item's cluster [n], how often each cluster is drawn [resamples, clusters])."""
    ids = cluster_indices(clusters, n)
    count = int(ids.max()) + 1
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)
    return ids, draws


def resampled_sums(clusters: ArrayLike | None, columns: Sequence[ArrayLike], resamples: int, seed: int) -> NDArray:
    """Sum of each column in every resample of clusters; [resamples, columns].

    As ``resampled_weights`` and a product, in portions: the weights of 40 000 pictures alone would take 600 MB.

    Args:
        columns: [n] each.
    """
    ids = cluster_indices(clusters, len(np.asarray(columns[0])))
    totals = np.stack([np.bincount(ids, np.asarray(c, float)) for c in columns], 1)
    count, rng, parts = len(totals), np.random.default_rng(seed), []
    step = max(1, PORTION // count)
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        parts.append(rng.multinomial(count, np.full(count, 1 / count), size=size) @ totals)
    return np.concatenate(parts)


def percentile_bounds(values: NDArray, level: float = LEVEL) -> tuple[float, float]:
    """The two quantiles between which the share ``level`` of the finite ``values`` lies; NaN without any."""
    values = values[np.isfinite(values)]
    if not len(values):
        return float("nan"), float("nan")
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def ratio_interval(
    numerator: ArrayLike,
    denominator: ArrayLike,
    clusters: ArrayLike | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> tuple[float, float, float]:
    """(value, low, high) of sum(numerator) / sum(denominator), resampling whole clusters.

    Several questions about one picture are not independent, so the picture is the unit that is drawn. A resample
    whose denominator is 0 is left out. An empty input gives NaN.

    Args:
        numerator, denominator: [n].
        clusters: [n] ids; None makes every item its own cluster (the ordinary bootstrap).
    """
    num, den = np.asarray(numerator, float), np.asarray(denominator, float)
    if not len(num) or den.sum() == 0:
        return float("nan"), float("nan"), float("nan")
    tops, bottoms = resampled_sums(clusters, (num, den), resamples, seed).T
    with np.errstate(divide="ignore", invalid="ignore"):
        low, high = percentile_bounds(tops / bottoms, level)
    return float(num.sum() / den.sum()), low, high


def mean_interval(
    values: ArrayLike, clusters: ArrayLike | None = None, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float, float]:
    """(mean, low, high) of ``values`` [n], by bootstrap over clusters."""
    values = np.asarray(values, float)
    return ratio_interval(values, np.ones_like(values), clusters, seed, resamples)


def ratio_gain_interval(
    numerator: ArrayLike,
    denominator: ArrayLike,
    control_numerator: ArrayLike,
    control_denominator: ArrayLike,
    clusters: ArrayLike | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> tuple[float, float, float]:
    """(difference, low, high) of two pooled ratios over the same items, resampling clusters for both together.

    Pairing the model with its control on the same items takes the items' difficulty out of the interval.

    Args:
        numerator, denominator, control_numerator, control_denominator: [n], item by item.
    """
    parts = [np.asarray(x, float) for x in (numerator, denominator, control_numerator, control_denominator)]
    if not len(parts[0]) or parts[1].sum() == 0 or parts[3].sum() == 0:
        return float("nan"), float("nan"), float("nan")
    a, b, c, d = resampled_sums(clusters, parts, resamples, seed).T
    with np.errstate(divide="ignore", invalid="ignore"):
        low, high = percentile_bounds(a / b - c / d)
    return float(parts[0].sum() / parts[1].sum() - parts[2].sum() / parts[3].sum()), low, high


def _weighted_auc(scores: NDArray, labels: NDArray, weights: NDArray) -> NDArray:
    """AUC for each row of ``weights`` [R, n]: P(positive above negative) + half of the ties."""
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(scores[order]) > 0])
    w = weights[:, order].astype(float)
    positive = np.add.reduceat(w * labels[order], starts, axis=1)
    negative = np.add.reduceat(w * ~labels[order], starts, axis=1)
    below = np.cumsum(negative, axis=1) - negative
    with np.errstate(divide="ignore", invalid="ignore"):
        return (positive * (below + negative / 2)).sum(1) / (positive.sum(1) * negative.sum(1))


def resampled_auc(scores: NDArray, labels: NDArray, ids: NDArray, draws: NDArray) -> NDArray:
    """AUC in every resample [R]; NaN where a class was not drawn.

    Args:
        scores: [n] float. labels: [n] bool.
        ids, draws: from :func:`resampled_weights`.
    """
    step = max(1, PORTION // len(ids))
    parts = [_weighted_auc(scores, labels, draws[i : i + step, ids]) for i in range(0, len(draws), step)]
    return np.concatenate(parts)


def auc(scores: ArrayLike, labels: ArrayLike) -> float:
    """Area under the ROC curve of ``scores`` [n] for bool ``labels`` [n]; ties count half; NaN if a class is empty."""
    scores, labels = np.asarray(scores, float), np.asarray(labels, bool)
    if not len(scores):
        return float("nan")
    return float(_weighted_auc(scores, labels, np.ones((1, len(scores))))[0])


def auc_interval(
    scores: ArrayLike, labels: ArrayLike, clusters: ArrayLike | None = None, seed: int = 0, resamples: int = 1000
) -> tuple[float, float, float]:
    """(AUC, low, high), by bootstrap over clusters."""
    scores, labels = np.asarray(scores, float), np.asarray(labels, bool)
    if not len(scores):
        return float("nan"), float("nan"), float("nan")
    ids, draws = resampled_weights(clusters, len(scores), resamples, seed)
    low, high = percentile_bounds(resampled_auc(scores, labels, ids, draws))
    return auc(scores, labels), low, high


def derangement(n: int, seed: int, groups: Sequence[object] | None = None) -> list[int]:
    """A permutation without fixed points, one random cycle, for the shuffled-media control: item i gets media p[i].

    Args:
        n: items; with 0 or 1 there is no derangement and the identity comes back.
        groups: when given, items also avoid media of their own group as far as 50 tries can do it.
    """
    rng = np.random.default_rng((seed, n))
    best, fewest = list(range(n)), n + 1
    for _ in range(50 if groups is not None else 1):
        cycle = rng.permutation(n)
        target = np.empty(n, dtype=int)
        target[cycle] = np.roll(cycle, -1)
        clashes = 0 if groups is None else sum(groups[i] == groups[int(target[i])] for i in range(n))
        if clashes < fewest:
            best, fewest = [int(t) for t in target], clashes
        if not fewest:
            break
    return best


def best_threshold(margins: ArrayLike, labels: ArrayLike) -> float:
    """The threshold t for which "yes if margin > t" is right most often on ``margins`` [n] with boolean ``labels`` [n].

    Candidates lie halfway between neighbouring margins; among equally good ones the middle one is taken, so that a
    wide gap between the classes is cut in its middle. Choose it on other pictures than the ones it is judged on.
    """
    margins, labels = np.asarray(margins, float), np.asarray(labels, bool)
    if not len(margins):
        return 0.0
    values = np.unique(margins)
    candidates = np.r_[values[0] - 1, (values[1:] + values[:-1]) / 2, values[-1] + 1]
    below_yes = np.searchsorted(np.sort(margins[labels]), candidates, side="right")
    below_no = np.searchsorted(np.sort(margins[~labels]), candidates, side="right")
    right = (labels.sum() - below_yes) + below_no
    winners = candidates[right == right.max()]
    return float(winners[(len(winners) - 1) // 2])
