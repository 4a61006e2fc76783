"""Queries with their nearest gallery entries, drawn at random with a fixed seed, for the page of an align run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor


def nearest_page(
    name: str,
    sim: Tensor,
    gallery: Sequence[str],
    truth: Sequence[int],
    media: Sequence[str],
    kind: str,
    seed: int = 0,
    queries: int = 12,
    side: int = 24,
    top: int = 5,
) -> dict[str, Any]:
    """Some queries with their ``top`` nearest names, and a ``side`` x ``side`` corner of the similarities.

    Args:
        sim: [Q, G].
        truth: the right gallery entry of each query.
        media: the file of each query; ``kind`` is ``image`` or ``audio``.

    Returns:
        ``{"name", "queries": [{"media", "kind", "truth", "nearest": [[name, similarity, right]]}],
        "heat": {"rows", "columns", "values"}}``; the heat map has queries of different names as rows, and these names
        as columns in the same order, so that right pairs lie on the diagonal.
    """
    order = np.random.default_rng(seed).permutation(len(truth)).tolist()
    chosen = []
    for q in order[:queries]:
        score, index = sim[q].float().topk(min(top, len(gallery)))
        found = [[gallery[g], round(float(s), 3), g == truth[q]] for s, g in zip(score, index.tolist())]
        chosen.append({"media": str(media[q]), "kind": kind, "truth": gallery[truth[q]], "nearest": found})
    first = list({truth[q]: q for q in reversed(order)}.values())[:side]
    columns = [truth[q] for q in first]
    values = [[round(float(x), 3) for x in sim[q][columns].float()] for q in first]
    names = [gallery[g] for g in columns]
    return {"name": name, "queries": chosen, "heat": {"rows": names, "columns": names, "values": values}}
