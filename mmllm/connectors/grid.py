"""The grid connector: each cell sees its neighbours, then an MLP carries it into the LLM's embedding space."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmllm.blocks.dropout import Dropout
from mmllm.connectors.base import FolderConnector, keep_mask, place_vectors
from mmllm.contracts import Features
from mmllm.errors import UserError
from mmllm.registry import register


@register("connector", "grid_mlp")
class GridMLPConnector(FolderConnector):
    """LayerNorm, 3x3 depthwise convolution over the grid, then a two-layer MLP; one output token per cell.

    The convolution starts as the identity (Dirac), so at the first step this is a plain MLP per cell. With
    ``positions`` a learned vector of the cell's row plus one of its column is added before the MLP's nonlinearity, so
    that what a cell sees and where it lies can be combined; both start at zero, so switching them on changes nothing
    before training. Another grid than ``grid`` gets them interpolated.

    Args:
        grid: rows and columns of the position vectors, needed only with ``positions``.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        hidden_dim: int = 768,
        dropout: float = 0.0,
        positions: bool = False,
        grid: tuple[int, int] | list[int] | None = None,
    ):
        if positions and (grid is None or len(grid) != 2):
            raise UserError("positions need the grid's rows and columns", "connector 'grid_mlp'", "give grid: [6, 6]")
        super().__init__(
            "grid_mlp",
            in_dim,
            out_dim,
            hidden_dim=hidden_dim,
            dropout=dropout,
            positions=positions,
            grid=list(grid) if grid is not None else None,
        )
        self.norm = nn.LayerNorm(in_dim)
        self.neighbours = nn.Conv2d(in_dim, in_dim, 3, padding=1, groups=in_dim)
        self.dropout = Dropout(dropout)
        self.fc1 = nn.Linear(in_dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, out_dim)
        nn.init.dirac_(self.neighbours.weight, groups=in_dim)
        assert self.neighbours.bias is not None
        nn.init.zeros_(self.neighbours.bias)
        if positions:
            rows, columns = grid  # type: ignore[misc]
            self.rows = nn.Parameter(torch.zeros(rows, hidden_dim))
            self.columns = nn.Parameter(torch.zeros(columns, hidden_dim))
        else:
            self.rows = self.columns = None

    def forward(self, features: Features, text: Features | None = None) -> tuple[Tensor, Tensor]:
        if features.grid is None:
            raise UserError(
                "connector 'grid_mlp' needs a tower whose tokens lie on a grid", do="use connector type mlp"
            )
        tokens, mask = self.content(features)
        t, h, w = features.grid
        b, n, d = tokens.shape
        x, _ = keep_mask(self.norm(tokens), mask)  # padding cells must not leak through the convolution
        x = x.transpose(1, 2).reshape(b, d, t, h, w).transpose(1, 2).reshape(b * t, d, h, w)
        x = self.neighbours(x).flatten(2).transpose(1, 2).reshape(b, n, d)
        x = self.fc1(self.dropout(x))
        if self.rows is not None:
            x = x + self.position_vectors(h, w).repeat(t, 1)
        return keep_mask(self.fc2(F.gelu(x)), mask)

    def position_vectors(self, h: int, w: int) -> Tensor:
        """[h * w, hidden_dim], row by row."""
        assert self.rows is not None and self.columns is not None
        return place_vectors(self.rows, self.columns, h, w)

    def num_tokens(self, grid_or_length: Any) -> int:
        return self.count(grid_or_length)
