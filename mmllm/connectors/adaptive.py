"""Adaptive pooling: every grid is averaged down to as many rows and columns, then an MLP (DeCo, 2405.20985)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmllm.connectors.base import FolderConnector, keep_mask
from mmllm.connectors.simple import MLP
from mmllm.contracts import Features
from mmllm.errors import UserError
from mmllm.registry import register


def pool_matrix(n: int, parts: int, like: Tensor) -> Tensor:
    """[parts, n] of 0 and 1: part i holds the cells floor(i n / parts) to ceil((i + 1) n / parts), as in torch's
    ``adaptive_avg_pool``; none is empty, and they overlap where n is not a multiple of ``parts``.
    """
    i = torch.arange(parts, device=like.device)[:, None]
    at = torch.arange(n, device=like.device)
    return ((at >= i * n // parts) & (at < -(-(i + 1) * n // parts))).to(like.dtype)


def pool_grid(cells: Tensor, mask: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Cells [B, t, h, w, D] with mask [B, t, h, w] -> means of the valid cells [B, t, rows, columns, D] and mask."""
    r, c = pool_matrix(cells.shape[2], rows, cells), pool_matrix(cells.shape[3], columns, cells)
    weight = mask.to(cells.dtype)
    total = torch.einsum("ih,bthwd,jw->btijd", r, cells * weight[..., None], c)
    count = torch.einsum("ih,bthw,jw->btij", r, weight, c)
    return total / count.clamp(min=1)[..., None], count > 0


@register("connector", "adaptive_pool")
class AdaptivePoolConnector(FolderConnector):
    """Each frame becomes ``rows`` x ``columns`` means of its cells, each carried by an MLP.

    Smaller grids are spread out, larger ones averaged. Off a grid the valid tokens are cut into rows * columns parts.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        rows: int = 8,
        columns: int = 8,
        hidden_dim: int | None = None,
        depth: int = 2,
        norm: bool = True,
        dropout: float = 0.0,
    ):
        if min(rows, columns, depth) < 1:
            raise UserError("rows, columns and depth must be at least 1", "connector 'adaptive_pool'")
        hidden = hidden_dim or out_dim
        super().__init__(
            "adaptive_pool",
            in_dim,
            out_dim,
            rows=rows,
            columns=columns,
            hidden_dim=hidden,
            depth=depth,
            norm=norm,
            dropout=dropout,
        )
        self.rows, self.columns = rows, columns
        self.mlp = MLP(in_dim, hidden, out_dim, depth, norm, dropout)

    def forward(self, features: Features, text: Features | None = None) -> tuple[Tensor, Tensor]:
        tokens, mask = keep_mask(*self.content(features))
        b, n, d = tokens.shape
        if features.grid is not None:
            t, h, w = features.grid
            cells, valid = pool_grid(tokens.reshape(b, t, h, w, d), mask.reshape(b, t, h, w), self.rows, self.columns)
            return keep_mask(self.mlp(cells.flatten(1, 3)), valid.flatten(1))
        parts = self.rows * self.columns
        inside = torch.zeros(b, parts, n, dtype=tokens.dtype, device=tokens.device)
        for row, length in enumerate(mask.sum(1).tolist()):  # valid tokens come first
            inside[row, :, :length] = pool_matrix(length, parts, tokens)
        pooled = inside @ tokens / inside.sum(-1, keepdim=True).clamp(min=1)
        return keep_mask(self.mlp(pooled), mask.any(1, keepdim=True).expand(b, parts))

    def num_tokens(self, grid_or_length: Any) -> int:
        frames = grid_or_length[0] if isinstance(grid_or_length, (tuple, list)) else 1
        return frames * self.rows * self.columns

    def out_grid(self, grid: tuple[int, int, int] | None) -> tuple[int, int, int] | None:
        return None if grid is None else (grid[0], self.rows, self.columns)
