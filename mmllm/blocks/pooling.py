"""Pools tokens to one vector under a mask."""

from __future__ import annotations

from torch import Tensor


def masked_mean(tokens: Tensor, mask: Tensor) -> Tensor:
    """Mean of the valid tokens: [B, N, D], [B, N] bool -> [B, D]; zeros where nothing is valid."""
    weight = mask[..., None].to(tokens.dtype)
    return (tokens * weight).sum(-2) / weight.sum(-2).clamp(min=1)
