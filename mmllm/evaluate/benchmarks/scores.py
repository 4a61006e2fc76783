"""Figures that many benchmarks share, each with its bootstrap interval over clusters: accuracy, groups, yes and no."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from mmllm.evaluate.benchmarks.base import Answered, split_of
from mmllm.evaluate.stats import RESAMPLES, auc_interval, percentile_bounds, resampled_sums
from mmllm.evaluate.tasks import Row, Sample, pooled_figures
from mmllm.report.figures import Figure


def slug(text: object) -> str:
    """A name for a figure: letters and digits of any case, other runs as one underscore."""
    return re.sub(r"\W+", "_", str(text)).strip("_")


def chance_of(rows: Sequence[Row]) -> float | None:
    """Mean chance of guessing one of each row's choices; None where a row has none."""
    counts = [len(r.sample.choices or ()) for r in rows]
    return sum(1 / n for n in counts) / len(counts) if counts and all(counts) else None


def by(rows: Sequence[Answered], key: Callable[[Answered], Hashable]) -> dict[Hashable, list[Answered]]:
    """Rows by key, in the order in which the keys come; rows whose key is None or empty are left out."""
    out: dict[Hashable, list[Answered]] = {}
    for row in rows:
        k = key(row)
        if k not in (None, ""):
            out.setdefault(k, []).append(row)
    return out


def accuracy_figures(
    name: str,
    rows: Sequence[Answered],
    seed: int,
    of: str | None = None,
    note: str | None = None,
) -> list[Figure]:
    """``NAME_accuracy`` with its control, and the accuracy of each value of ``meta[of]``."""
    out = pooled_figures(f"{name}_accuracy", rows, chance_of(rows), seed=seed, note=note)
    if of is not None:
        for key, some in by(rows, lambda r: r.sample.meta.get(of)).items():
            out += pooled_figures(f"{name}_accuracy_{slug(key)}", some, chance_of(some), seed=seed)[:1]
    return out


def grouped(rows: Sequence[Answered], key: Callable[[Answered], Hashable]) -> list[Row]:
    """One row per group (and control): right only when every row of the group is; its cluster is the first row's."""
    groups = by(rows, lambda r: (r.sample.control, key(r)) if key(r) is not None else None)
    out = []
    for (control, name), some in groups.items():  # type: ignore[misc]
        first = some[0].sample
        sample = Sample(str(name), first.cluster, first.media, "", None, control=control)
        out.append(Row(sample, "", hit=float(all(r.hit == 1 for r in some))))
    return out


def yes_no_figures(
    name: str, rows: Sequence[Answered], seed: int, positive: str = "yes", lmms: bool = False
) -> list[Figure]:
    """Accuracy, precision, recall, F1, yes ratio, and the AUC of the margin where there are scores.

    An answer that nothing was made of is wrong, and no positive answer. Empty denominators give 0.

    Args:
        positive: the answer that precision and recall are about ("no" for AMBER).
        lmms: recall as lmms-eval counts it, over the positives that were answered with yes or no; F1 follows.
    """

    def said(r: Row) -> float:
        return float(r.parsed == positive) if isinstance(r, Answered) else 0.0

    def true(r: Row) -> float:
        return float(r.sample.gold == positive)

    def answered(r: Row) -> float:
        return true(r) * float(not lmms or getattr(r, "parsed", None) is not None)

    note = "F1 and recall leave out positives without a yes or no, as lmms-eval does" if lmms else None
    always = sum(r.sample.gold == positive for r in rows) / max(len(rows), 1)
    out = pooled_figures(f"{name}_accuracy", rows, max(always, 1 - always), seed=seed, note="chance: one answer always")
    precision = _only(f"{name}_precision", rows, seed, lambda r: (said(r) * true(r), said(r)))
    recall = _only(f"{name}_recall", rows, seed, lambda r: (said(r) * true(r), answered(r)), note)
    f1 = _only(f"{name}_f1", rows, seed, lambda r: (2 * said(r) * true(r), said(r) + answered(r)), note)
    f1.chance = 2 * always / (1 + always)
    yes = _only(f"{name}_yes_ratio", rows, seed, lambda r: (float(getattr(r, "parsed", None) == "yes"), 1.0))
    yes.note = "share of answers that are yes"
    out += [precision, recall, f1, yes]
    scored = [r for r in rows if r.margin is not None and not r.sample.control]
    if scored:
        value, low, high = auc_interval([r.margin for r in scored], [r.sample.gold == "yes" for r in scored],  # type: ignore[arg-type]
                                        [r.sample.cluster for r in scored], seed)  # fmt: skip
        out.append(Figure(f"{name}_auc", value, "higher", low, high, len(scored), "fraction", chance=0.5,
                          note="of the yes-no margin: leaning to one answer cannot change it"))  # fmt: skip
    return out


def _only(
    name: str, rows: Sequence[Answered], seed: int, of: Callable[[Row], tuple[float, float]], note: str | None = None
) -> Figure:
    """One ratio without control, 0 where its denominator is empty."""
    figure = pooled_figures(name, [r for r in rows if not r.sample.control], None, "higher", seed, of, note)[0]
    if figure.value is None and rows:
        figure.value = 0.0
    return figure


def ratio_sum_interval(
    parts: Sequence[tuple[ArrayLike, ArrayLike, Sequence[object], float]], seed: int = 0
) -> tuple[float, float, float]:
    """(value, low, high) of a weighted sum of ratios, resampling the clusters of all parts together.

    Args:
        parts: (numerator [n], denominator [n], clusters [n], weight) of each ratio; n may differ between parts.
    """
    clusters = [str(c) for part in parts for c in part[2]]
    if not clusters:
        return float("nan"), float("nan"), float("nan")
    columns, start = np.zeros((2 * len(parts), len(clusters))), 0
    for i, (numerator, denominator, names, _) in enumerate(parts):
        own = slice(start, start + len(names))
        columns[2 * i, own], columns[2 * i + 1, own] = numerator, denominator
        start = own.stop
    weights = np.array([part[3] for part in parts])
    with np.errstate(divide="ignore", invalid="ignore"):
        whole, sums = columns.sum(1), resampled_sums(clusters, list(columns), RESAMPLES, seed)
        value = float((weights * whole[::2] / whole[1::2]).sum())
        low, high = percentile_bounds((sums[:, ::2] / sums[:, 1::2]) @ weights)
    return value, low, high


def unparsed_figure(name: str, rows: Sequence[Answered]) -> Figure:
    """Share of the answers (controls aside) that the style's parser accepted nothing of."""
    real = [r for r in rows if not r.sample.control]
    count = sum(r.parsed is None for r in real)
    return Figure(f"{name}_unparsed", count / max(len(real), 1), "lower", n=len(real), unit="fraction",
                  note=f"{count} of {len(real)} answers were not understood and count as wrong")  # fmt: skip


def split_names(rows: Sequence[Answered]) -> list[str]:
    """The splits of the rows, in their order."""
    return list(dict.fromkeys(split_of(r.sample) for r in rows))
