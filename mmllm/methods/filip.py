"""FILIP: Fine-grained Interactive Language-Image Pre-Training (arXiv 2111.07783).

slug: filip
number: 8
shelf: 1
kind: objective
config: "objectives: [{type: filip, options: {pair: [image, text]}}]  # and a connector for either stream"
left_out: averaging over prompt templates at inference, and the FILIP300M data.
differs: a third-party version keeps 16 tokens by summed similarity and adds a global CLIP loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmllm.align.objectives import InfoNCE
from mmllm.contracts import AlignBatch
from mmllm.errors import UserError
from mmllm.registry import register


@register("objective", "filip")
class Filip(InfoNCE):
    """InfoNCE on token-wise late interaction, each direction with its own similarity (section 3.1).

    Args:
        keep: share of an item's tokens that take part, those with the highest best cosine to any token of the other
            stream's batch (section 3.1, "token dropping"); 1 keeps all.
    """

    def __init__(self, pair: Sequence[str], same_label: bool = True, keep: float = 1.0):
        super().__init__(pair, same_label, scorer="late_interaction")
        if not 0 < keep <= 1:
            raise UserError(f"keep must be above 0 and at most 1 (got {keep})", "objective 'filip'")
        self.keep = keep

    def _rows(self, batch: AlignBatch, name: str) -> tuple[Any, Tensor | None]:
        rows, owner = super()._rows(batch, name)
        if self.keep == 1:
            return rows, owner
        other = self.scorer.rows(batch.streams[self.pair[name == self.pair[0]]])
        return (rows[0], self.kept(rows, other)), owner

    @torch.no_grad()
    def kept(self, rows: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> Tensor:
        """The mask [N, M] of the tokens that take part: of each item its ``keep`` best, at least one."""
        (tokens, mask), others = rows, other[0][other[1]]
        best = torch.stack([(t @ others.T).amax(-1) for t in tokens]).masked_fill(~mask, -torch.inf)
        count = (mask.sum(-1, keepdim=True) * self.keep).ceil().clamp(min=1)
        return mask & (best.argsort(-1, descending=True).argsort(-1) < count)
