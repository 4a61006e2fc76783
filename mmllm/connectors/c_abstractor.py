"""Honeybee's C-abstractor: convolutions, adaptive pooling, convolutions, MLP (arXiv 2312.06742, section 3.2)."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mmllm.connectors.adaptive import pool_grid
from mmllm.connectors.base import FolderConnector, keep_mask
from mmllm.connectors.simple import MLP
from mmllm.contracts import Features
from mmllm.errors import UserError
from mmllm.registry import register


class _Bottleneck(nn.Module):
    """x + 1x1(gate(3x3 depthwise(1x1(norm x)))): a residual block whose channels are gated by their frame's mean."""

    def __init__(self, dim: int):
        super().__init__()
        squeezed = max(dim // 4, 1)
        self.norm = nn.LayerNorm(dim)
        self.fc_in, self.fc_out = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.neighbours = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.squeeze, self.excite = nn.Linear(dim, squeezed), nn.Linear(squeezed, dim)

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        """x [F, h, w, D], weight [F, h, w, 1] of 0 and 1 -> [F, h, w, D]; cells of weight 0 reach no other."""
        y = F.silu(self.fc_in(self.norm(x))) * weight
        y = F.silu(self.neighbours(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)) * weight
        mean = y.sum((1, 2), keepdim=True) / weight.sum((1, 2), keepdim=True).clamp(min=1)
        y = y * self.excite(F.silu(self.squeeze(mean))).sigmoid()
        return x + self.fc_out(y)


@register("connector", "c_abstractor")
class CAbstractorConnector(FolderConnector):
    """``blocks`` residual convolution blocks, each frame averaged to ``rows`` x ``columns``, as many blocks, an MLP.

    Needs a tower whose tokens lie on a grid.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        rows: int = 8,
        columns: int = 8,
        hidden_dim: int = 256,
        blocks: int = 3,
        depth: int = 2,
        dropout: float = 0.0,
    ):
        if min(rows, columns, hidden_dim, blocks, depth) < 1:
            raise UserError(
                "rows, columns, hidden_dim, blocks and depth must be at least 1", "connector 'c_abstractor'"
            )
        super().__init__(
            "c_abstractor",
            in_dim,
            out_dim,
            rows=rows,
            columns=columns,
            hidden_dim=hidden_dim,
            blocks=blocks,
            depth=depth,
            dropout=dropout,
        )
        self.rows, self.columns = rows, columns
        self.norm_in, self.proj_in = nn.LayerNorm(in_dim), nn.Linear(in_dim, hidden_dim)
        self.before = nn.ModuleList(_Bottleneck(hidden_dim) for _ in range(blocks))
        self.after = nn.ModuleList(_Bottleneck(hidden_dim) for _ in range(blocks))
        self.mlp = MLP(hidden_dim, out_dim, out_dim, depth, True, dropout)

    def forward(self, features: Features, text: Features | None = None) -> tuple[Tensor, Tensor]:
        if features.grid is None:
            raise no_grid()
        tokens, mask = self.content(features)
        t, h, w = features.grid
        b = len(tokens)
        x = self.proj_in(self.norm_in(tokens)).view(b * t, h, w, -1)
        valid = mask.reshape(b * t, h, w)
        for block in self.before:
            x = block(x, valid[..., None].to(x.dtype))
        x, valid = (y[:, 0] for y in pool_grid(x[:, None], valid[:, None], self.rows, self.columns))
        for block in self.after:
            x = block(x, valid[..., None].to(x.dtype))
        return keep_mask(self.mlp(x.reshape(b, -1, x.shape[-1])), valid.reshape(b, -1))

    def num_tokens(self, grid_or_length: Any) -> int:
        """Raises UserError for a length: there is no count without a grid."""
        if not isinstance(grid_or_length, (tuple, list)):
            raise no_grid()
        return grid_or_length[0] * self.rows * self.columns

    def out_grid(self, grid: tuple[int, int, int] | None) -> tuple[int, int, int] | None:
        return None if grid is None else (grid[0], self.rows, self.columns)


def no_grid() -> UserError:
    return UserError(
        "connector 'c_abstractor' needs a tower whose tokens lie on a grid", do="use connector type perceiver"
    )
