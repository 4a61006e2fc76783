"""The query transformer: K learned queries read the tower's tokens by cross-attention (BLIP-2, arXiv 2301.12597)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmllm.connectors.base import FolderConnector
from mmllm.contracts import Features
from mmllm.errors import UserError
from mmllm.registry import register


class _Attention(nn.Module):
    """Multi-head attention of ``x`` over ``memory``; pre-norm and residual are outside."""

    def __init__(self, dim: int, memory_dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = nn.Linear(dim, dim), nn.Linear(memory_dim, dim), nn.Linear(memory_dim, dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, memory: Tensor, allowed: Tensor | None = None) -> Tensor:
        """x [B, K, D], memory [B, N, M], allowed [B, N] bool -> [B, K, D]."""

        def split(y: Tensor) -> Tensor:
            return y.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        bias = None
        if allowed is not None:
            bias = torch.zeros(allowed.shape, dtype=x.dtype, device=x.device)
            bias = bias.masked_fill(~allowed, torch.finfo(x.dtype).min)[:, None, None]
        y = F.scaled_dot_product_attention(
            split(self.q(x)), split(self.k(memory)), split(self.v(memory)), attn_mask=bias
        )
        return self.out(y.transpose(1, 2).flatten(2))


class _Block(nn.Module):
    """Self-attention among the queries, cross-attention to the tower where asked, feed-forward; all pre-norm."""

    def __init__(self, dim: int, memory_dim: int, heads: int, cross: bool, dropout: float):
        super().__init__()
        self.norm_self, self.self_attention = nn.LayerNorm(dim), _Attention(dim, dim, heads)
        self.norm_cross = nn.LayerNorm(dim) if cross else None
        self.cross_attention = _Attention(dim, memory_dim, heads) if cross else None
        self.norm_mlp = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor, memory: Tensor, allowed: Tensor) -> Tensor:
        y = self.norm_self(x)
        x = x + self.self_attention(y, y)
        if self.cross_attention is not None and self.norm_cross is not None:
            x = x + self.cross_attention(self.norm_cross(x), memory, allowed)
        return x + self.mlp(self.norm_mlp(x))


@register("connector", "qformer")
class QFormerConnector(FolderConnector):
    """``num_queries`` learned queries pass through ``num_layers`` blocks with cross-attention every ``cross_every``.

    Always gives ``num_queries`` tokens, whatever the input's length; padding and order of the padding don't matter.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        num_queries: int = 16,
        num_layers: int = 2,
        hidden_dim: int = 256,
        num_heads: int = 4,
        cross_every: int = 1,
        dropout: float = 0.0,
    ):
        if hidden_dim % num_heads:
            raise UserError(
                f"hidden_dim {hidden_dim} is not a multiple of num_heads {num_heads}", "connector 'qformer'"
            )
        if min(num_queries, num_layers, cross_every) < 1:
            raise UserError("num_queries, num_layers and cross_every must be at least 1", "connector 'qformer'")
        super().__init__(
            "qformer",
            in_dim,
            out_dim,
            num_queries=num_queries,
            num_layers=num_layers,
            hidden_dim=hidden_dim,
            num_heads=num_heads,
            cross_every=cross_every,
            dropout=dropout,
        )
        self.num_queries = num_queries
        self.queries = nn.Parameter(torch.randn(num_queries, hidden_dim) * 0.02)
        self.norm_in = nn.LayerNorm(in_dim)
        self.blocks = nn.ModuleList(
            _Block(hidden_dim, in_dim, num_heads, i % cross_every == 0, dropout) for i in range(num_layers)
        )
        self.norm_out = nn.LayerNorm(hidden_dim)
        self.out = nn.Linear(hidden_dim, out_dim)

    def forward(self, features: Features, text: Features | None = None) -> tuple[Tensor, Tensor]:
        # Class tokens stay: queries can use them, and they cost no output token.
        tokens, mask = self.content(Features(features.tokens, features.mask, features.pooled))
        x = self.queries.expand(len(tokens), -1, -1)
        memory = self.norm_in(tokens)
        for block in self.blocks:
            x = block(x, memory, mask)
        return self.out(self.norm_out(x)), mask.any(1, keepdim=True).expand(-1, self.num_queries)

    def num_tokens(self, grid_or_length: Any) -> int:
        return self.num_queries
