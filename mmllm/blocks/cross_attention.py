"""Multi-head attention of some tokens over others: what query transformers, resamplers and injected layers share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmllm.blocks.transformer import attend


class CrossAttention(nn.Module):
    """Attention of ``x`` over ``memory``; norms and residuals are outside.

    Args:
        dim: width of x and of the result, a multiple of ``heads``.
        memory_dim: width of the memory.
    """

    def __init__(self, dim: int, memory_dim: int, heads: int):
        super().__init__()
        if dim % heads:
            raise ValueError(f"width {dim} is not a multiple of {heads} heads")
        self.heads = heads
        self.q, self.k, self.v = nn.Linear(dim, dim), nn.Linear(memory_dim, dim), nn.Linear(memory_dim, dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, memory: Tensor, allowed: Tensor | None = None) -> Tensor:
        """x [B, K, D], memory [B, N, M] -> [B, K, D].

        Args:
            allowed: bool, [B, N] or [B, K, N], True where x may look; a row that may look nowhere gives finite numbers
                that mean nothing.
        """

        def split(y: Tensor) -> Tensor:
            return y.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        bias = None
        if allowed is not None:
            bias = torch.zeros(allowed.shape, dtype=x.dtype, device=x.device)
            bias = bias.masked_fill(~allowed, torch.finfo(x.dtype).min)
            bias = bias[:, None, None] if allowed.ndim == 2 else bias[:, None]
        y = attend(split(self.q(x)), split(self.k(memory)), split(self.v(memory)), bias)
        return self.out(y.transpose(1, 2).flatten(2))


def feed_forward(dim: int, dropout: float = 0.0) -> nn.Sequential:
    """Two linear layers with GELU between, four times as wide inside."""
    return nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * dim, dim))
