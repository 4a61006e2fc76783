"""Scorers: how alike two items are, for losses, retrieval, zero-shot classes and search. Others join by registry."""

from __future__ import annotations

from typing import Any

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


def score_all(scorer: Scorer, query: Any, gallery: Any, size: int = 1024) -> Tensor:
    """All scores [Q, G], made in squares of ``size`` (64 for scorers on tokens), so that nothing else grows."""
    size = size if isinstance(query, Tensor) else min(size, 64)

    def count(x: Any) -> int:
        return len(x) if isinstance(x, Tensor) else len(x[0])

    def part(x: Any, at: int) -> Any:
        return x[at : at + size] if isinstance(x, Tensor) else tuple(t[at : at + size] for t in x)

    rows = [
        torch.cat([scorer.score(part(query, i), part(gallery, j)) for j in range(0, count(gallery), size)], 1)
        for i in range(0, count(query), size)
    ]
    return torch.cat(rows)
