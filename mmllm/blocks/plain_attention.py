"""Attention by plain matrix products for short training rows on a CPU, with as few passes over the scores as it takes.

The backward of torch's fused kernel costs more than the products there (``benchmarks/tune_speed.py``); the eager
attention of transformers makes float32 copies of all scores and repeats grouped keys. Same numbers as eager, up to the
last bits of the gradient in bfloat16: the softmax is computed in float32 inside its kernel and kept as bfloat16.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _Attention(torch.autograd.Function):
    """Queries of one group of heads stand below each other, so that keys and values are used as they are."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        """q [B, G * H, L, D], k [B, H, N, D], v [B, H, N, E], additive mask [B or 1, 1, L, N] -> [B, G * H, L, E]."""
        batch, heads, length = q.shape[:3]
        groups = heads // k.shape[1]
        q = (q * scale).reshape(batch, k.shape[1], groups * length, -1)
        scores = q @ k.transpose(-1, -2)
        if mask is not None:
            scores.view(batch, -1, groups, length, k.shape[2]).add_(mask[:, :, None].to(scores.dtype))
        share = scores.softmax(-1)
        ctx.save_for_backward(q, k, v, share)
        ctx.scale, ctx.shape = scale, (batch, heads, length, -1)
        return (share @ v).view(ctx.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, share = ctx.saved_tensors
        grad = grads[0].reshape(*q.shape[:3], -1)
        grad_v = share.transpose(-1, -2) @ grad
        grad_share = grad @ v.transpose(-1, -2)
        grad_scores = torch.ops.aten._softmax_backward_data(grad_share, share, -1, share.dtype)
        grad_q = (grad_scores @ k).mul_(ctx.scale).view(ctx.shape)
        return grad_q, grad_scores.transpose(-1, -2) @ q, grad_v, None, None


def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Softmax attention with grouped keys, without dropout; the gradient exists once.

    Args:
        q: [B, G * H, L, D]; k: [B, H, N, D]; v: [B, H, N, E], all of one dtype.
        mask: additive, [B or 1, 1, L, N], without -inf over a whole row; None: all see all.

    Returns:
        [B, G * H, L, E].
    """
    return _Attention.apply(q, k, v, mask, scale)  # type: ignore[return-value]
