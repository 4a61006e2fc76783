"""Exact k-means with a k-means++ start, chunk by chunk, the same on every machine and in every process for one seed."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def kmeans(x: Tensor, k: int, seed: int = 0, iterations: int = 20, chunk: int = 4096) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm: centroids [k, D], the means of their rows, and the cluster of each row of ``x`` [N, D], [N].

    It ends early when no row changes its cluster. A cluster that loses all rows takes the row farthest from its own
    centroid. Starts by k-means++ (Arthur and Vassilvitskii, SODA 2007).

    Raises:
        ValueError: k is not within 1..N.
    """
    if not 1 <= k <= len(x):
        raise ValueError(f"{k} clusters of {len(x)} rows")
    x = x.detach().float()
    generator = torch.Generator().manual_seed(seed)
    centroids = x[_plus_plus(x, k, generator)].clone()
    cluster = torch.full((len(x),), -1, device=x.device)
    for _ in range(iterations):
        distance, nearest = _nearest(x, centroids, chunk)
        for empty in (torch.bincount(nearest, minlength=k) == 0).nonzero().flatten().tolist():
            lonely = int(_alone(distance, nearest, k))
            nearest[lonely], distance[lonely] = empty, 0.0
        if torch.equal(nearest, cluster):
            break
        cluster = nearest
        centroids = cluster_means(x, cluster, k)
    return centroids, cluster


def cluster_means(x: Tensor, cluster: Tensor, k: int) -> Tensor:
    """[k, D]: mean of the rows [N, D] of each cluster [N]; zero for one without; rows of cluster -1 count nowhere."""
    kept = cluster >= 0
    x, cluster = x[kept], cluster[kept]
    count = torch.bincount(cluster, minlength=k).clamp(min=1)
    return x.new_zeros(k, x.shape[1]).index_add(0, cluster, x) / count[:, None].to(x)


def _plus_plus(x: Tensor, k: int, generator: torch.Generator) -> list[int]:
    """Rows to start from: each next one with a chance that grows with its squared distance to those chosen."""
    chosen = [int(torch.randint(len(x), (1,), generator=generator))]
    squared = (x - x[chosen[0]]).square().sum(1)
    while len(chosen) < k:
        # Drawn in double precision in main memory, so that the draw does not depend on the device.
        mass = squared.double().cpu().cumsum(0)
        if float(mass[-1]) <= 0:  # fewer different rows than clusters
            rest = [i for i in range(len(x)) if i not in set(chosen)]
            return chosen + rest[: k - len(chosen)]
        point = torch.rand(1, generator=generator, dtype=torch.float64) * mass[-1]
        chosen.append(min(int(torch.searchsorted(mass, point, right=True)), len(x) - 1))
        squared = torch.minimum(squared, (x - x[chosen[-1]]).square().sum(1))
    return chosen


def _nearest(x: Tensor, centroids: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """Squared distance to the nearest centroid, and its number; [N] each."""
    parts = []
    for rows in x.split(chunk):
        squared = rows.square().sum(1, keepdim=True) - 2 * rows @ centroids.T + centroids.square().sum(1)
        parts.append(squared.min(1))
    return torch.cat([p.values for p in parts]), torch.cat([p.indices for p in parts])


def _alone(distance: Tensor, cluster: Tensor, k: int) -> Tensor:
    """The row farthest from its centroid, of those whose cluster has others."""
    shared = torch.bincount(cluster, minlength=k)[cluster] > 1
    return distance.masked_fill(~shared, -torch.inf).argmax()
