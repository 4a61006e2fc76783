"""Contrastive losses on similarity matrices: softmax (InfoNCE) with several positives, and sigmoid (SigLIP)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def softmax_contrast(logits: Tensor, positive: Tensor | None = None, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of each row against its positives; [R].

    With several positives the target is spread evenly over them. A row without a positive gives 0.

    Args:
        logits: [R, C].
        positive: [R, C] bool; None means the diagonal (R <= C).
        label_smoothing: share of the target spread over all columns.
    """
    log_p = logits.float().log_softmax(-1)
    if positive is None:
        picked = log_p.diagonal()
        valid = torch.ones_like(picked)
    else:
        count = positive.sum(-1)
        picked = (log_p * positive).sum(-1) / count.clamp(min=1)
        valid = (count > 0).to(log_p.dtype)
    return -valid * ((1 - label_smoothing) * picked + label_smoothing * log_p.mean(-1))


def symmetric_infonce(logits: Tensor, positive: Tensor | None = None, label_smoothing: float = 0.0) -> Tensor:
    """Mean of the row and the column loss of square logits [B, B] per item; [B] (CLIP, arXiv 2103.00020)."""
    columns = None if positive is None else positive.T
    return 0.5 * (
        softmax_contrast(logits, positive, label_smoothing) + softmax_contrast(logits.T, columns, label_smoothing)
    )


def sigmoid_contrast(logits: Tensor, positive: Tensor | None = None) -> Tensor:
    """Binary cross-entropy of every pair, summed over columns; [R] (SigLIP, arXiv 2303.15343, equation 1)."""
    if positive is None:
        positive = torch.eye(*logits.shape, dtype=torch.bool, device=logits.device)
    sign = positive.to(logits.dtype) * 2 - 1
    return -F.logsigmoid(sign * logits.float()).sum(-1)
