"""CWCL: Cross-Modal Transfer with Continuously Weighted Contrastive Loss (arXiv 2309.14580).

slug: cwcl
number: 6
shelf: 1
kind: objective
config: "objectives: [{type: cwcl, options: {pair: [text, image]}}]  # the first stream is the frozen one"
left_out: the paper's towers (SigLIP-sized pictures, Whisper); any frozen tower serves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mmllm.align.directed import DirectedObjective
from mmllm.blocks.tiled_contrast import contrast
from mmllm.contracts import AlignBatch
from mmllm.errors import UserError, unknown
from mmllm.registry import register

SIDES = ("frozen", "trained")


@register("objective", "cwcl")
class CWCL(DirectedObjective):
    """Contrast with a frozen stream, in which every pair is positive as far as the frozen embeddings are alike
    (equations 3 and 4): weights ``w_ij = ((1 + <p_i, p_j>) / 2) ** power`` of a row divided by their sum.

    The weights take the place of the labels in one direction; the other is InfoNCE. Nothing flows back into the frozen
    stream.

    Args:
        pair: the frozen stream and the one that trains.
        anchor: which stream's rows the weighted direction belongs to, ``frozen`` (as in the paper) or ``trained``.
        power: sharpens the weights; 1 is the paper's. With nearly orthogonal embeddings and 128 items an item keeps
            only 1.5 % of its own target.
        same_label: in the direction without weights, see PairObjective.
    """

    def __init__(self, pair: Sequence[str], anchor: str = "frozen", power: float = 1.0, same_label: bool = True):
        super().__init__(pair, same_label)
        if anchor not in SIDES:
            raise unknown("anchor", anchor, SIDES, "objective 'cwcl'")
        if power <= 0:
            raise UserError(f"power must be above 0 (got {power})", "objective 'cwcl'")
        self.weighted_forth, self.power = anchor == "frozen", power

    def prepared(self, rows: Any, first: bool) -> Any:
        return rows.detach() if first else rows

    def one_way(self, rows: Any, cols: Any, batch: AlignBatch, *, forth: bool, target_fn: Any, **how: Any) -> Tensor:
        scale = batch.logit_scale[self.pair_name]
        if forth != self.weighted_forth:
            return contrast(rows, cols, scale=scale, target_fn=target_fn, **how)
        if len(rows) != len(cols):
            raise UserError("cwcl needs one row per item in both streams", "objective 'cwcl'", "captions: first")
        frozen = rows if forth else cols
        frozen = frozen if batch.ranks is None else batch.ranks.gather(frozen)

        def weights(i: slice, j: slice) -> Tensor:
            return ((1 + frozen[i] @ frozen[j].T).clamp(min=0) / 2) ** self.power

        return contrast(rows, cols, scale=scale, target_fn=weights, **how)
