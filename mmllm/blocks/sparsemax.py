"""Sparsemax: the nearest point of the probability simplex, where softmax gives a point inside it (arXiv 1602.02068)."""

from __future__ import annotations

import torch
from torch import Tensor


def sparsemax(z: Tensor) -> Tensor:
    """Euclidean projection of the last dimension onto the simplex; same shape, in at least float32.

    ``max(z - t, 0)`` with t such that it sums to 1 (algorithm 1). Gradients flow within the support alone. Entries of
    ``-inf`` get 0.
    """
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    ordered = z.detach().sort(dim=-1, descending=True).values
    place = torch.arange(1, z.shape[-1] + 1, device=z.device, dtype=z.dtype)
    total = ordered.cumsum(-1) - 1
    # The support is a prefix of the sorted entries, so its size is how often the condition holds.
    size = (place * ordered > total).sum(-1, keepdim=True).clamp(min=1)
    inside = z.detach() >= ordered.gather(-1, size - 1)
    count = inside.sum(-1, keepdim=True)  # ties with the last one of the support have the value 0 either way
    threshold = (z.masked_fill(~inside, 0.0).sum(-1, keepdim=True) - 1) / count
    return (z - threshold).clamp(min=0)
