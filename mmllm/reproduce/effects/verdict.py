"""Paired differences over seeds: mean, t interval, and what may be said."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with its t interval (n - 1 degrees of freedom)."""

    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Outcome:
    """What an effect came to.

    Attributes:
        arms: arm -> its metric over the seeds.
        difference: method minus baseline, seed by seed.
        verdict: ``shown``, ``noise`` or ``opposite``.
    """

    arms: dict[str, Interval]
    difference: Interval
    verdict: str


def t_interval(values: ArrayLike, level: float = LEVEL) -> Interval:
    """Mean and its interval under Student's t; without bounds for fewer than two values.

    Raises:
        ValueError: a value that is not a number.
    """
    from scipy.stats import t

    x = np.asarray(values, dtype=float)
    if not len(x) or not np.isfinite(x).all():
        raise ValueError(f"not all of these are numbers: {values}")
    if len(x) < 2:
        return Interval(float(x.mean()), -math.inf, math.inf, len(x))
    half = float(t.ppf(0.5 + level / 2, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x)))
    return Interval(float(x.mean()), float(x.mean()) - half, float(x.mean()) + half, len(x))


def judge(values: Mapping[str, Sequence[float]], compare: tuple[str, str], better: str) -> Outcome:
    """The verdict: ``shown`` where the whole interval of the paired difference lies on the expected side of zero.

    Args:
        values: arm -> metric of each seed, the same seeds in the same order for all.
        compare: (method, baseline).
        better: ``higher`` or ``lower``.
    """
    method, baseline = (np.asarray(values[name], dtype=float) for name in compare)
    difference = t_interval(method - baseline)
    good, bad = (difference.low, -difference.high) if better == "higher" else (-difference.high, difference.low)
    verdict = "shown" if good > 0 else "opposite" if bad > 0 else "noise"
    return Outcome({name: t_interval(v) for name, v in values.items()}, difference, verdict)
