"""Rows whose branches share a prefix, without what a training step computes in vain."""

from __future__ import annotations

import torch
from torch import Tensor


def without_last_tokens(
    branch_ids: Tensor, inputs_embeds: Tensor, position_ids: Tensor, rows: Tensor, columns: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The rows without the last token of each branch: nothing is predicted from it, and no other token sees it.

    Of questions with short answers that is a token in twenty.

    Args:
        branch_ids, position_ids: [B, L], as ``mmllm.data.conversations.collate`` makes them.
        inputs_embeds: [B, L, H].
        rows, columns: [n], the places whose logits are wanted; they all stay.

    Returns:
        branch_ids, inputs_embeds and position_ids of the shorter rows, padded on the right, and the new columns.
    """
    follows = torch.cat([branch_ids[:, 1:], torch.full_like(branch_ids[:, :1], -1)], dim=1)
    ends = (branch_ids > 0) & (follows != branch_ids)
    ends[rows, columns] = False
    kept = ~ends & (branch_ids >= 0)
    place = kept.cumsum(1) - 1
    lengths = kept.sum(1)
    index = torch.zeros(len(kept), int(lengths.max()), dtype=torch.long, device=kept.device)
    r, c = kept.nonzero(as_tuple=True)
    index[r, place[r, c]] = c
    padding = torch.arange(index.shape[1], device=kept.device) >= lengths[:, None]
    embeds = inputs_embeds.gather(1, index[..., None].expand(-1, -1, inputs_embeds.shape[-1]))
    branches = branch_ids.gather(1, index).masked_fill(padding, -1)
    return branches, embeds, position_ids.gather(1, index), place[rows, columns]
