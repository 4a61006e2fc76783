"""How embeddings lie in their space: gap between modalities, alignment, uniformity, linear CKA, effective rank."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmllm.report.figures import Figure


def modality_gap(x: Tensor, y: Tensor) -> float:
    """Distance between the means of two modalities' unit vectors [N, D] and [M, D] (arXiv 2203.02053)."""
    x, y = _unit(x), _unit(y)
    return float((x.mean(0) - y.mean(0)).norm())


def alignment(x: Tensor, y: Tensor, alpha: float = 2.0) -> float:
    """Mean of ||x - y||^alpha over pairs of unit vectors [N, D]; 0 is best (arXiv 2005.10242, equation 1)."""
    return float((_unit(x) - _unit(y)).norm(dim=1).pow(alpha).mean())


def uniformity(x: Tensor, t: float = 2.0, chunk: int = 1024) -> float:
    """Log of the mean of exp(-t ||x - x'||^2) over all pairs of different rows of [N, D]; lower is more uniform.

    arXiv 2005.10242, equation 2, chunk by chunk.
    """
    x = _unit(x)
    n = len(x)
    if n < 2:
        return float("nan")
    total = torch.zeros((), dtype=x.dtype)
    for start in range(0, n, chunk):
        part = x[start : start + chunk]
        squared = (2 - 2 * part @ x.T).clamp(min=0)
        kernel = torch.exp(-t * squared)
        kernel[torch.arange(len(part)), torch.arange(start, start + len(part))] = 0
        total = total + kernel.sum()
    return float(torch.log(total / (n * (n - 1))))


def linear_cka(x: Tensor, y: Tensor) -> float:
    """||Xc^T Yc||^2 / (||Xc^T Xc|| ||Yc^T Yc||) of paired features [N, Dx], [N, Dy], columns centred.

    arXiv 1905.00414: 1 for features that differ by rotation, scale and shift, 0 for uncorrelated ones.
    """
    x, y = (v.double() - v.double().mean(0) for v in (x, y))
    return float((x.T @ y).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm()))


def effective_rank(x: Tensor, centre: bool = False) -> float:
    """exp of the entropy of the normalised singular values of [N, D] (Roy and Vetterli, EUSIPCO 2007); 1 to min(N, D).

    Args:
        centre: take the mean row away first.
    """
    x = x.double() - (x.double().mean(0) if centre else 0)
    values = torch.linalg.svdvals(x)
    share = values / values.sum()
    share = share[share > 0]
    return float(torch.exp(-(share * share.log()).sum()))


def geometry_figures(name: str, first: str, second: str, x: Tensor, y: Tensor) -> list[Figure]:
    """All of them for two streams whose rows [N, D] belong together, beside what shuffled partners give.

    The control of ``alignment`` and ``cka`` pairs every row with its neighbour's partner.
    """
    pair, rolled = f"{name}_{first}_{second}", y.roll(1, 0)
    n = len(x)
    out = [
        Figure(f"{pair}_gap", modality_gap(x, y), "lower", n=n, unit="distance"),
        Figure(f"{pair}_alignment", alignment(x, y), "lower", n=n, unit="distance²", control=alignment(x, rolled)),
        Figure(f"{pair}_cka", linear_cka(x, y), n=n, unit="cka", control=linear_cka(x, rolled)),
    ]
    for stream, rows in ((first, x), (second, y)):
        out.append(Figure(f"{pair}_uniformity_{stream}", uniformity(rows), "lower", n=n, unit="log"))
        out.append(Figure(f"{pair}_effective_rank_{stream}", effective_rank(rows), n=n, unit="dimensions"))
    return out


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x.double(), dim=-1)
