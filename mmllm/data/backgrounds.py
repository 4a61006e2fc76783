"""Procedural backgrounds for composed scenes: eight kinds, any size, every draw from the given generator."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

KINDS = ("flat", "gradient", "stripes", "checker", "noise", "blobs", "cells", "horizon")


def _colours(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Two colours, [3] float32 each; sometimes dark or close to each other, so that no brightness is special."""
    low = 0 if rng.random() < 0.25 else 90
    a = rng.integers(low, 256, 3).astype(np.float32)
    if rng.random() < 0.4:
        b = np.clip(a + rng.integers(-45, 46, 3), 0, 255).astype(np.float32)
    else:
        b = rng.integers(low, 256, 3).astype(np.float32)
    return a, b


def _octaves(rng: np.random.Generator, size: int, cells: tuple[int, ...]) -> np.ndarray:
    """Smooth noise in 0..1, [size, size] float32, summed over grids of the given cell counts."""
    total = np.zeros((size, size), np.float32)
    for n in cells:
        grid = Image.fromarray(rng.integers(0, 256, (n, n), dtype=np.uint8))
        total += np.asarray(grid.resize((size, size), Image.Resampling.BICUBIC), np.float32) / n
    total -= total.min()
    return total / max(float(total.max()), 1e-6)


def background(rng: np.random.Generator, size: int, kinds: tuple[str, ...] = KINDS) -> np.ndarray:
    """One background, [size, size, 3] uint8."""
    kind = kinds[int(rng.integers(len(kinds)))]
    a, b = _colours(rng)
    axis = np.arange(size, dtype=np.float32) / size
    yy, xx = axis[:, None], axis[None, :]
    angle = float(rng.random()) * 2 * math.pi
    along = xx * math.cos(angle) + yy * math.sin(angle)
    if kind == "flat":
        mix = np.zeros((size, size), np.float32)
    elif kind == "gradient":
        mix = np.clip(0.5 + along - 0.5 * (math.cos(angle) + math.sin(angle)), 0, 1)
    elif kind == "stripes":
        wave = np.sin(2 * math.pi * int(rng.integers(2, 9)) * along)
        mix = (wave > 0).astype(np.float32) if rng.random() < 0.4 else 0.5 + 0.5 * wave
        mix = mix * float(rng.uniform(0.3, 1.0))
    elif kind == "checker":
        n = int(rng.integers(3, 10))
        mix = (((xx * n).astype(int) + (yy * n).astype(int)) % 2).astype(np.float32) * float(rng.uniform(0.2, 0.9))
    elif kind == "noise":
        mix = _octaves(rng, size, (4, 8, 16, 48))
    elif kind == "blobs":
        mix = np.clip((_octaves(rng, size, (int(rng.integers(4, 9)),)) - 0.5) * 8 + 0.5, 0, 1)
    elif kind == "cells":  # nearest of a few random points, like paving or fields
        n = int(rng.integers(5, 16))
        points, shade = rng.random((n, 2), dtype=np.float32), rng.random(n, dtype=np.float32)
        distance = (xx[..., None] - points[:, 0]) ** 2 + (yy[..., None] - points[:, 1]) ** 2
        mix = shade[distance.argmin(-1)]
    elif kind == "horizon":  # ground and sky, each with a little texture
        line = float(rng.uniform(0.35, 0.75)) + 0.06 * (_octaves(rng, size, (4,))[:1] - 0.5)
        mix = np.clip((yy > line).astype(np.float32) * 0.8 + 0.2 * _octaves(rng, size, (8, 24)), 0, 1)
    else:
        raise ValueError(f"unknown background: {kind}")
    mix = np.broadcast_to(mix, (size, size))[..., None]
    return (a * (1 - mix) + b * mix).astype(np.uint8)
