"""The nearest items of a gallery, found chunk by chunk with ties in the gallery's order."""

from __future__ import annotations

import torch
from torch import Tensor

from mmllm.contracts import Scorer


def nearest(
    query: Tensor, gallery: Tensor, k: int, scorer: Scorer | None = None, chunk: int = 65536, query_chunk: int = 1024
) -> tuple[Tensor, Tensor]:
    """The k highest scores of each query and where they stand; [Q, k] float32 and [Q, k] long, best first.

    Of equal scores the earlier item comes first; NaN comes last.

    Args:
        query: [Q, D]; gallery: [G, D].
        k: at most G.
        chunk, query_chunk: gallery items and queries scored together.
    """
    scorer = Scorer() if scorer is None else scorer
    values, places = [], []
    for at in range(0, len(query), query_chunk):
        best = torch.empty(len(query[at : at + query_chunk]), 0)
        where = torch.empty(best.shape, dtype=torch.long)
        for start in range(0, len(gallery), chunk):
            scores = scorer.score(query[at : at + query_chunk], gallery[start : start + chunk]).detach().float().cpu()
            scores = torch.nan_to_num(scores, nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
            here = torch.arange(start, start + scores.shape[1]).expand(scores.shape)
            best, where = torch.cat([best, scores], 1), torch.cat([where, here], 1)
            best, order = best.sort(dim=1, descending=True, stable=True)
            best, where = best[:, :k], where.gather(1, order[:, :k])
        values.append(best)
        places.append(where)
    return torch.cat(values), torch.cat(places)
