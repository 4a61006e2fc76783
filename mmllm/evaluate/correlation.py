"""Correlation of ranks."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


def spearman(x: ArrayLike, y: ArrayLike) -> float:
    """Spearman's correlation of two lists of numbers, ties sharing their mean rank; NaN where one is constant."""
    from scipy.stats import rankdata

    ranks = [rankdata(np.asarray(v, dtype=float)) for v in (x, y)]
    a, b = (r - r.mean() for r in ranks)
    scale = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / scale if scale else float("nan")
