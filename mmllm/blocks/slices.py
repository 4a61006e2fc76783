"""Cutting n items into parts of nearly equal length."""

from __future__ import annotations

import math


def even_slices(n: int, size: int) -> list[slice]:
    """Slices that cover 0..n, none longer than ``size``, whose lengths differ by at most 1."""
    parts = max(1, math.ceil(n / size))
    edges = [n * k // parts for k in range(parts + 1)]
    return [slice(a, b) for a, b in zip(edges, edges[1:])]
