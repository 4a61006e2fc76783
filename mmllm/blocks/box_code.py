"""The fixed directions in which a box is written into a vector: visual tokens and an LLM's box tokens share them."""

from __future__ import annotations

import torch
from torch import Tensor

COORDINATES = 4


def box_code(dim: int, bins: int, seed: int = 0) -> Tensor:
    """[4, bins, dim] orthonormal directions: one per coordinate (x0, y0, x1, y1) and bin.

    Raises:
        ValueError: more directions than dimensions.
    """
    if COORDINATES * bins > dim:
        raise ValueError(f"{COORDINATES} x {bins} directions in {dim} dimensions")
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(dim, COORDINATES * bins, generator=generator))
    return basis.T.reshape(COORDINATES, bins, dim).contiguous()
