"""The code in which a box is written into a vector: visual tokens and an LLM's box tokens share it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

COORDINATES = 4
HARMONICS = 3
WAVES = 2 * HARMONICS


def waves(values: Tensor) -> Tensor:
    """Coordinates in 0..1, any shape -> [..., 6]: cosines and sines of a half, one and one and a half turns, length 1.

    Near values are near each other, and the code has few dimensions: a low-rank adapter of an LLM can carry all of it
    from a visual token to an answer, which it can't with a direction for each of many bins.
    """
    turns = torch.arange(1, HARMONICS + 1, device=values.device, dtype=values.dtype) * math.pi
    angles = values.clamp(0, 1)[..., None] * turns
    return torch.cat([angles.cos(), angles.sin()], -1) / HARMONICS**0.5


def box_axes(dim: int, seed: int = 0) -> Tensor:
    """[4, 6, dim] orthonormal directions: the waves of each coordinate (x0, y0, x1, y1); the same every time.

    Raises:
        ValueError: more directions than dimensions.
    """
    if COORDINATES * WAVES > dim:
        raise ValueError(f"{COORDINATES * WAVES} directions in {dim} dimensions")
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(dim, COORDINATES * WAVES, generator=generator))
    return basis.T.reshape(COORDINATES, WAVES, dim).contiguous()


def box_code(dim: int, bins: int) -> Tensor:
    """[4, bins, dim]: the middle of each bin of each coordinate in the code, each of length 1."""
    middles = (torch.arange(bins) + 0.5) / bins
    return torch.einsum("bw,kwd->kbd", waves(middles), box_axes(dim))
