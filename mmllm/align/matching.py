"""Which thing each token on no grid (a query, a latent) stands for: the best assignment of things to tokens."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor


@torch.no_grad()
def assigned_things(
    tokens: Tensor, mask: Tensor | None, words: Tensor, index: dict[str, int], boxes: list[list[dict[str, Any]]]
) -> Tensor:
    """Number of the thing, within its item, that each token stands for, [B, M]; -1 for none.

    Each thing has one token: the assignment with the highest sum of cosines to the things' words (Hungarian method, as
    in DETR, arXiv 2005.12872, section 3.1), around the mean word. Of more things than tokens some have none.

    Args:
        tokens: [B, M, D]; mask: [B, M], None: all count.
        words: [V, D]; index: name -> row of words.
        boxes: the things of each item.
    """
    centre = words.mean(0)
    table = F.normalize(words - centre, dim=-1)
    near = F.normalize(tokens - centre, dim=-1) @ table.T
    if mask is not None:
        near = near.masked_fill(~mask[..., None], -2.0)
    owner = torch.full(tokens.shape[:2], -1)
    for row, things in enumerate(boxes):
        if things:
            names = torch.tensor([index[t["text"]] for t in things], device=near.device)
            held, which = linear_sum_assignment(near[row][:, names].float().cpu().numpy(), maximize=True)
            owner[row, torch.from_numpy(held)] = torch.from_numpy(which)
    if mask is not None:
        owner = owner.masked_fill(~mask.cpu(), -1)
    return owner.to(tokens.device)
