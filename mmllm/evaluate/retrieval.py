"""Retrieval and zero-shot classification from a similarity matrix, with chance, control and intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmllm.evaluate.stats import derangement, mean_interval
from mmllm.report.figures import Figure


def positive_mask(positives: Any, shape: tuple[int, int]) -> Tensor:
    """Positives in any of three forms as a [Q, G] bool mask.

    Args:
        positives: [Q, G] bool tensor; or one gallery index per query; or a list of gallery indices per query.

    Raises:
        ValueError: the number of queries does not fit.
    """
    if isinstance(positives, Tensor) and positives.dtype == torch.bool:
        mask = positives
    else:
        items = positives.tolist() if isinstance(positives, Tensor | np.ndarray) else list(positives)
        mask = torch.zeros(len(items), shape[1], dtype=torch.bool)
        for row, item in enumerate(items):
            mask[row, torch.as_tensor(item, dtype=torch.long).reshape(-1)] = True
    if tuple(mask.shape) != tuple(shape):
        raise ValueError(f"positives of shape {tuple(mask.shape)} for similarities of shape {tuple(shape)}")
    return mask


def ranks(sim: Tensor, positives: Any) -> Tensor:
    """Rank (0 = first) of each query's best positive among the negatives; [Q] long.

    A tie with a negative counts against the model, so that a collapsed model (all similarities equal) scores nothing;
    NaN counts as the lowest similarity. Other positives of the query do not push the rank down.
    """
    sim = torch.nan_to_num(sim.detach().float().cpu(), nan=-torch.inf, posinf=torch.finfo(torch.float32).max)
    mask = positive_mask(positives, tuple(sim.shape)).cpu()  # type: ignore[arg-type]
    if not bool(mask.any(1).all()):
        raise ValueError("a query without any positive in the gallery")
    best = sim.masked_fill(~mask, -torch.inf).amax(1, keepdim=True)
    return ((sim >= best) & ~mask).sum(1)


def retrieval_metrics(sim: Tensor, positives: Any, ks: Sequence[int] = (1, 5)) -> dict[str, float]:
    """Recall at k and the median rank, one direction.

    Args:
        sim: [Q, G] similarities of queries to the gallery; transpose it (and the mask) for the other direction.
        positives: see :func:`positive_mask`.

    Returns:
        ``r1``, ``r5``, ... (fractions), ``median_rank`` (1 = first), ``chance_r1``, ..., ``n`` (queries), ``gallery``.
    """
    mask = positive_mask(positives, tuple(sim.shape))  # type: ignore[arg-type]
    place = ranks(sim, mask)
    out: dict[str, float] = {f"r{k}": float((place < k).float().mean()) for k in ks}
    out["median_rank"] = float(place.float().median()) + 1
    out |= {f"chance_r{k}": chance_recall(mask, k) for k in ks}
    return {**out, "n": len(place), "gallery": sim.shape[1]}


def chance_recall(mask: Tensor, k: int) -> float:
    """Expected recall at k of a random ranking for a [Q, G] mask of positives, with ``ranks``' rule for positives."""
    return chance_recall_of(mask.sum(1).tolist(), mask.shape[1], k)


def chance_recall_of(counts: Sequence[int], gallery: int, k: int) -> float:
    """As ``chance_recall``, from the number of positives of each query."""
    total = 0.0
    for p in counts:
        # No positive among the first k: product over the draws of (negatives left / items left).
        miss = 1.0
        for i in range(min(k, gallery)):
            miss *= max(gallery - p - i, 0) / (gallery - i)
        total += 1 - miss
    return total / max(len(counts), 1)


def retrieval_figures(
    name: str, sim: Tensor, positives: Any, ks: Sequence[int] = (1, 5), clusters: Any = None, seed: int = 0
) -> list[Figure]:
    """``NAME_r1``, ``NAME_r5``... with bootstrap interval, chance, and the control of queries swapped among themselves.

    Args:
        clusters: [Q] ids of what is resampled together (for instance the concept); None resamples queries.
    """
    mask = positive_mask(positives, tuple(sim.shape))  # type: ignore[arg-type]
    place = ranks(sim, mask)
    swapped = ranks(sim[derangement(len(sim), seed)], mask)
    out = []
    for k in ks:
        value, low, high = mean_interval((place < k).numpy(), clusters, seed)
        control, control_low, control_high = mean_interval((swapped < k).numpy(), clusters, seed)
        out.append(
            Figure(
                f"{name}_r{k}",
                value,
                "higher",
                low,
                high,
                len(place),
                "fraction",
                control,
                control_low,
                control_high,
                chance_recall(mask, k),
                note=f"gallery of {sim.shape[1]}",
            )
        )
    return out


def class_embeddings(texts: Tensor) -> Tensor:
    """Mean of the unit vectors of each class's prompts, made unit again: [C, T, D] -> [C, D]."""
    unit = torch.nn.functional.normalize(texts.float(), dim=-1)
    return torch.nn.functional.normalize(unit.mean(1), dim=-1)


def zero_shot_figure(name: str, sim: Tensor, labels: Sequence[int], clusters: Any = None, seed: int = 0) -> Figure:
    """Accuracy of the nearest class for ``sim`` [N, C] and true class indices [N]; chance is the largest class's share.

    The control swaps the items among themselves. Ties count against the model.
    """
    truth = torch.as_tensor(labels, dtype=torch.long)
    hit = (ranks(sim, truth) < 1).numpy()
    control = (ranks(sim[derangement(len(sim), seed)], truth) < 1).numpy()
    value, low, high = mean_interval(hit, clusters, seed)
    majority = float(torch.bincount(truth).max() / len(truth))
    swapped, swapped_low, swapped_high = mean_interval(control, clusters, seed)
    return Figure(
        name,
        value,
        "higher",
        low,
        high,
        len(hit),
        "fraction",
        swapped,
        swapped_low,
        swapped_high,
        majority,
        note=f"{sim.shape[1]} classes; chance is always naming the largest class",
    )
