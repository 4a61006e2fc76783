"""RMSNorm with a frozen weight as one step of autograd, its backward written out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        kind = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=kind)
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).to(x.dtype) * weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        grad = grads[0] * weight
        wide = x.to(scale.dtype)
        along = (wide * grad).sum(-1, keepdim=True)  # what would change the norm alone has no gradient
        out = (grad * scale).addcmul_(wide, along.mul_(scale**3).div_(x.shape[-1]), value=-1)
        return out.to(x.dtype), None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension: [..., d], [d] -> [..., d].

    As transformers' models of the Llama kind compute it: the mean in float32, the result of the division in x's dtype.
    The weight gets no gradient. Zhang and Sennrich, Root Mean Square Layer Normalization (2019).
    """
    return _RMSNorm.apply(x, weight, eps)  # type: ignore[return-value]
