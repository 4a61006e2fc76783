"""CiCo: Domain-Aware Sign Language Retrieval via Cross-Lingual Contrastive Learning (arXiv 2303.12793).

slug: cico
number: 58
shelf: 1
kind: objective
config: "objectives: [{type: cico, options: {pair: [video, text]}}]  # and a connector for both streams"
left_out: the sign encoder trained on pseudo-labels of another domain, and the sign language data.
differs: released code masks padding only after the softmax over tokens; here padding takes no part in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmllm.align.objectives import PairObjective
from mmllm.blocks.tiled_contrast import contrast
from mmllm.contracts import AlignBatch, Scorer, Stream
from mmllm.errors import UserError
from mmllm.registry import register

Tokens = Sequence[Tensor]  # unit tokens [N, M, P] and their mask [N, M] bool


def soft_alignment(query: Tokens, gallery: Tokens, temperature: float) -> Tensor:
    """Each query token's mean cosine with the gallery item's tokens, weighted by their softmax; the mean of them.

    ``mean_i sum_j softmax_j(E_ij / temperature) E_ij``, [Q, G]. Towards 0 the temperature gives each token's best
    cosine, towards infinity the mean of all. Padding takes no part; an item without tokens scores 0.
    """
    (q, q_mask), (g, g_mask) = query, gallery
    alike = torch.einsum("qmd,gnd->qgmn", q, g)
    share = (alike / temperature).masked_fill(~g_mask.bool()[None, :, None], torch.finfo(alike.dtype).min).softmax(-1)
    each = (share * alike).sum(-1) * g_mask.any(-1)[None, :, None]
    weight = q_mask.to(each.dtype)[:, None]
    return (each * weight).sum(-1) / weight.sum(-1).clamp(min=1)


@register("scorer", "cico")
class CiCoScorer(Scorer):
    """The mean of both directions' soft alignment, which is what retrieval goes by.

    Args:
        temperature: of the softmax over tokens.
    """

    needs = frozenset({"token_embedding"})

    def __init__(self, temperature: float = 0.07):
        if temperature <= 0:
            raise UserError(f"temperature must be above 0 (got {temperature})", "scorer 'cico'")
        self.temperature = temperature

    def rows(self, stream: Stream) -> tuple[Tensor, Tensor]:
        """Unit tokens and their mask."""
        assert stream.token_embedding is not None and stream.token_mask is not None
        return F.normalize(stream.token_embedding, dim=-1), stream.token_mask.bool()

    def score(self, query: Tokens, gallery: Tokens) -> Tensor:
        there, back = soft_alignment(query, gallery, self.temperature), soft_alignment(gallery, query, self.temperature)
        return (there + back.T) / 2


@register("objective", "cico")
class CiCo(PairObjective):
    """InfoNCE on two matrices of similarities, as the first stream's tokens find the second's and the other way round.

    Args:
        pair: streams with a connector, such as video and text.
        temperature: of the softmax over tokens.
        own: share of the loss of each matrix in its own direction (the first stream's matrix: its rows among texts);
            the rest is in the other.
        augmented: a derived stream of the second that stands in for it in its own matrix, such as one with
            ``transforms: [word_dropout]``.
    """

    def __init__(
        self,
        pair: Sequence[str],
        same_label: bool = True,
        temperature: float = 0.07,
        own: float = 1.0,
        augmented: str | None = None,
    ):
        super().__init__(pair, same_label, {"type": "cico", "temperature": temperature})
        if not 0 <= own <= 1:
            raise UserError(f"own must be in 0..1 (got {own})", "objective 'cico'")
        self.temperature, self.own, self.augmented = temperature, own, augmented
        if augmented is not None:
            self.needs = self.needs | {f"{augmented}.token_embedding"}

    def _rows(self, batch: AlignBatch, name: str) -> tuple[Any, Tensor | None]:
        """(tokens, mask) of the first stream; of the second the same, then those of its augmented view."""
        rows, owner = super()._rows(batch, name)
        if name == self.pair[0]:
            return rows, owner
        return (*rows, *self.scorer.rows(batch.streams[self.augmented or name])), owner

    def _both(self, rows: Any, cols: Any, batch: AlignBatch, targets: Any) -> Tensor:
        return 0.5 * (self._one(rows, cols, batch, targets) + self._one(cols, rows, batch, targets))

    def matrix(self, first: Sequence[Tensor], second: Sequence[Tensor], number: int) -> Tensor:
        """Similarities [first, second] as the first stream (1) or the second (2) looks for the other."""
        if number == 1:
            return soft_alignment(first, second[:2], self.temperature)
        return soft_alignment(second[2:], first, self.temperature).T

    def loss(self, rows: Any, cols: Any, batch: AlignBatch, *, score_fn: Any = None, **how: Any) -> Tensor:
        scale, forth = batch.logit_scale[self.pair_name], len(rows) == 2
        total: Any = 0.0
        for number in (1, 2):
            share = self.own if (number == 1) == forth else 1 - self.own
            if not share:
                continue

            def score(x: Any, y: Any, number: int = number) -> Tensor:
                return self.matrix(x, y, number) if forth else self.matrix(y, x, number).T

            total = total + share * contrast(rows, cols, scale=scale, score_fn=score, **how)
        return total
