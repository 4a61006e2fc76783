"""Scorers: how alike two items are, for losses, retrieval, zero-shot classes and search. Others join by registry."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmllm.contracts import Scorer, Stream
from mmllm.registry import register


@register("scorer", "cosine")
class Cosine(Scorer):
    """Cosine of the pooled embeddings."""


@register("scorer", "late_interaction")
class LateInteraction(Scorer):
    """Mean over the query's tokens of each one's best cosine among the gallery item's tokens (FILIP, arXiv 2111.07783).

    Reads ``token_embedding`` (a connector as token-level head); padding takes no part. Not symmetric: each side asks
    with its own tokens.
    """

    needs = frozenset({"token_embedding"})
    symmetric = False

    def rows(self, stream: Stream) -> tuple[Tensor, Tensor]:
        """Unit tokens [N, M, P] and their mask [N, M]."""
        assert stream.token_embedding is not None and stream.token_mask is not None
        return F.normalize(stream.token_embedding, dim=-1), stream.token_mask

    def score(self, query: tuple[Tensor, Tensor], gallery: tuple[Tensor, Tensor]) -> Tensor:
        (q, q_mask), (g, g_mask) = query, gallery
        alike = torch.einsum("qmd,gnd->qgmn", q, g).masked_fill(~g_mask.bool()[None, :, None], -torch.inf)
        best = alike.amax(-1).nan_to_num(neginf=0.0)
        weight = q_mask.to(best.dtype)[:, None]
        return (best * weight).sum(-1) / weight.sum(-1).clamp(min=1)
