"""Pixel shuffle: blocks of neighbouring cells become one wider token, and an MLP carries it (InternVL, 2404.16821)."""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from mmllm.connectors.base import FolderConnector, keep_mask
from mmllm.connectors.simple import MLP
from mmllm.contracts import Features
from mmllm.errors import UserError
from mmllm.registry import register


@register("connector", "pixel_shuffle")
class PixelShuffleConnector(FolderConnector):
    """``factor`` x ``factor`` cells side by side make one token of factor² times the width; nothing is averaged away.

    Off a grid, factor² tokens in a row are joined (frame stacking of sounds). A last block that is not full is filled
    with zeros, so a grid (t, h, w) gives t * ceil(h / factor) * ceil(w / factor) tokens and a row of n
    ceil(n / factor²).
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        factor: int = 2,
        hidden_dim: int | None = None,
        depth: int = 2,
        norm: bool = True,
        dropout: float = 0.0,
    ):
        if factor < 1 or depth < 1:
            raise UserError("factor and depth must be at least 1", "connector 'pixel_shuffle'")
        hidden = hidden_dim or out_dim
        super().__init__(
            "pixel_shuffle", in_dim, out_dim, factor=factor, hidden_dim=hidden, depth=depth, norm=norm, dropout=dropout
        )
        self.factor = factor
        self.mlp = MLP(in_dim * factor**2, hidden, out_dim, depth, norm, dropout)

    def forward(self, features: Features, text: Features | None = None) -> tuple[Tensor, Tensor]:
        tokens, mask = keep_mask(*self.content(features))
        s = self.factor
        b, n, d = tokens.shape
        if features.grid is None:
            pad = -n % (s * s)
            tokens = F.pad(tokens, (0, 0, 0, pad)).reshape(b, -1, s * s * d)
            mask = F.pad(mask, (0, pad)).view(b, -1, s * s).any(-1)
        else:
            t, h, w = features.grid
            pad_h, pad_w = -h % s, -w % s
            cells = F.pad(tokens.reshape(b, t, h, w, d), (0, 0, 0, pad_w, 0, pad_h))
            rows, columns = (h + pad_h) // s, (w + pad_w) // s
            cells = cells.view(b, t, rows, s, columns, s, d).transpose(3, 4)
            tokens = cells.reshape(b, t * rows * columns, s * s * d)
            valid = F.pad(mask.reshape(b, t, h, w), (0, pad_w, 0, pad_h))
            mask = valid.view(b, t, rows, s, columns, s).any(-1).any(3).view(b, -1)
        return keep_mask(self.mlp(tokens), mask)

    def num_tokens(self, grid_or_length: Any) -> int:
        s = self.factor
        if isinstance(grid_or_length, (tuple, list)):
            t, h, w = grid_or_length
            return t * math.ceil(h / s) * math.ceil(w / s)
        return math.ceil(int(grid_or_length) / (s * s))

    def out_grid(self, grid: tuple[int, int, int] | None) -> tuple[int, int, int] | None:
        return None if grid is None else (grid[0], -(-grid[1] // self.factor), -(-grid[2] // self.factor))
