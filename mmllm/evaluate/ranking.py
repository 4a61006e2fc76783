"""Retrieval between any two sets of embeddings, chunk by chunk: recall, median rank and mAP with several positives."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import torch
from torch import Tensor

from mmllm.contracts import Scorer
from mmllm.evaluate.retrieval import chance_recall_of
from mmllm.evaluate.stats import derangement, mean_interval
from mmllm.report.figures import Figure

KS = (1, 5, 10)
# Scores closer than this are a tie: how a matrix product is cut up may change the last bits of equal similarities.
TIE = 1e-6


@dataclass
class Ranking:
    """How each query's positives rank.

    Attributes:
        first: [Q] long, negatives before the best positive (0 = first).
        precision: [Q] average precision.
        positives: [Q] long, how many positives each query has.
        gallery: items ranked.
    """

    first: Tensor
    precision: Tensor
    positives: Tensor
    gallery: int

    def metrics(self, ks: Sequence[int] = KS) -> dict[str, float]:
        """``r1``, ``r5``... (fractions), ``median_rank`` (1 = first), ``map``, and ``chance_r1``... ``chance_map``."""
        counts = self.positives.tolist()
        out = {f"r{k}": float((self.first < k).float().mean()) for k in ks}
        out |= {"median_rank": float(self.first.float().median()) + 1, "map": float(self.precision.mean())}
        out |= {f"chance_r{k}": chance_recall_of(counts, self.gallery, k) for k in ks}
        return out | {"chance_map": chance_precision(counts, self.gallery)}


def positives_by_key(queries: Sequence[Hashable], gallery: Sequence[Hashable]) -> list[list[int]]:
    """For each query the gallery items that have its key (its id, its label)."""
    places: dict[Hashable, list[int]] = {}
    for place, key in enumerate(gallery):
        places.setdefault(key, []).append(place)
    return [places.get(key, []) for key in queries]


class Rows(tuple):
    """Several tensors with one row per item, as a scorer of tokens takes them, that are cut and counted by items."""

    def __len__(self) -> int:
        return len(next(iter(self)))

    def __getitem__(self, index: Any) -> Rows:  # type: ignore[override]
        return Rows(part[index] for part in self)


def rank_positives(
    query: Tensor | Rows,
    gallery: Tensor | Rows,
    positives: Sequence[Sequence[int]],
    scorer: Scorer | None = None,
    chunk: int = 1024,
    gallery_chunk: int = 16384,
) -> Ranking:
    """Ranks a gallery for each query without holding all similarities at once.

    A tie with a negative counts against the model, and NaN counts as the lowest similarity, so that the result depends
    on no order and a collapsed model scores nothing. The average precision of a query is the mean over its positives of
    (positives so far) / (items so far).

    Args:
        query: [Q, D]; gallery: [G, D]; or the Rows that the scorer takes.
        positives: gallery items of each query.
        scorer: cosine unless given.

    Raises:
        ValueError: a query without positives, or another number of them than of queries.
    """
    if len(positives) != len(query) or not all(len(p) for p in positives):
        raise ValueError(f"{len(query)} queries, {sum(1 for p in positives if len(p))} lists of positives")
    scorer = Scorer() if scorer is None else scorer
    first, precision = [], []
    for start in range(0, len(query), chunk):
        part, held = query[start : start + chunk], positives[start : start + chunk]
        width = max(len(p) for p in held)
        columns = torch.tensor([[*p, *[-1] * (width - len(p))] for p in held])
        real = columns >= 0
        scores = torch.full(columns.shape, torch.inf)
        for block, rows, at, here in _blocks(scorer, part, gallery, columns, gallery_chunk):
            scores[here] = block[rows, at]
        scores = scores.sort(dim=1, descending=True).values  # what only fills up comes first, with its infinite score
        above = torch.zeros(columns.shape, dtype=torch.long)
        for block, rows, at, here in _blocks(scorer, part, gallery, columns, gallery_chunk):
            block[rows, at] = -torch.inf
            negatives = block.shape[1] - here.sum(1, keepdim=True)
            reach = block.shape[1] - torch.searchsorted(block.sort(dim=1).values, (scores - TIE).contiguous())
            above += torch.minimum(reach, negatives)  # a positive without a score reaches down to the others, too
        filled = (~real).sum(1, keepdim=True)
        place = torch.arange(width)[None] - filled
        precision.append(torch.where(place >= 0, (place + 1) / (above + place + 1), 0.0).sum(1) / real.sum(1))
        first.append(above.gather(1, filled)[:, 0])
    counts = torch.tensor([len(p) for p in positives])
    return Ranking(torch.cat(first), torch.cat(precision), counts, len(gallery))


def _blocks(
    scorer: Scorer, query: Any, gallery: Any, columns: Tensor, size: int
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Finite scores [q, g] of one part of the gallery after the other, and where positives lie in it.

    Yields the scores, the rows and columns of the positives in them, and the mask over ``columns`` of those.
    """
    limit = torch.finfo(torch.float32).max
    number = torch.arange(len(columns))[:, None].expand_as(columns)
    for start in range(0, len(gallery), size):
        scores = scorer.score(query, gallery[start : start + size]).detach().float().cpu()
        here = (columns >= start) & (columns < start + size)
        block = torch.nan_to_num(scores, nan=-torch.inf, posinf=limit, neginf=-torch.inf)
        yield block, number[here], columns[here] - start, here


def chance_precision(counts: Sequence[int], gallery: int) -> float:
    """Expected average precision of a random order: with R of N relevant, (R-1)/(N-1) (1 - H_N/N) + H_N/N."""
    harmonic = sum(1 / i for i in range(1, gallery + 1)) / gallery
    rest = [(r - 1) / max(gallery - 1, 1) * (1 - harmonic) for r in counts]
    return sum(rest) / max(len(rest), 1) + harmonic


def pair_figures(
    name: str,
    embeddings: Mapping[str, Tensor | Rows],
    keys: Mapping[str, Sequence[Hashable]],
    ks: Sequence[int] = KS,
    scorer: Scorer | None = None,
    seed: int = 0,
) -> list[Figure]:
    """``NAME_A_to_B_r1``, ``..._median_rank``, ``..._map`` for every ordered pair of streams.

    Each has a bootstrap interval over keys, chance, and the control of queries swapped among themselves. Queries
    without a partner in the other stream are left out, and the note says how many.

    Args:
        embeddings: stream -> [N, D], or Rows for a scorer of tokens.
        keys: stream -> [N]; rows of the same key belong together.
    """
    out: list[Figure] = []
    for a, b in permutations(embeddings, 2):
        found = positives_by_key(keys[a], keys[b])
        rows = [i for i, p in enumerate(found) if p]
        if not rows or len(embeddings[b]) < 2:
            out.append(Figure(f"{name}_{a}_to_{b}_r{ks[0]}", None, note="no item has both"))
            continue
        query, positives = embeddings[a][rows], [found[i] for i in rows]
        clusters = [str(keys[a][i]) for i in rows]
        ranking = rank_positives(query, embeddings[b], positives, scorer)
        swapped = rank_positives(query[derangement(len(query), seed)], embeddings[b], positives, scorer)
        chance, alone = ranking.metrics(ks), len(found) - len(rows)
        note = f"gallery of {ranking.gallery}" + (f"; {alone} queries without a partner" if alone else "")
        series = {f"r{k}": (ranking.first < k, swapped.first < k) for k in ks}
        series["map"] = (ranking.precision, swapped.precision)
        for key, (own, control) in series.items():
            value, low, high = mean_interval(own.numpy(), clusters, seed)
            other, other_low, other_high = mean_interval(control.numpy(), clusters, seed)
            out.append(
                Figure(
                    f"{name}_{a}_to_{b}_{key}", value, "higher", low, high, len(rows), "fraction", other, other_low,
                    other_high, chance[f"chance_{key}"], note=note,
                )
            )  # fmt: skip
        median, control_median = (float(r.first.float().median()) + 1 for r in (ranking, swapped))
        title = f"{name}_{a}_to_{b}_median_rank"
        out.append(Figure(title, median, "lower", n=len(rows), unit="rank", control=control_median, note=note))
    return out
