"""The plain connectors: one linear layer, an MLP, and pooling of neighbours before an MLP."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmllm.blocks.dropout import Dropout
from mmllm.connectors.base import FolderConnector, keep_mask
from mmllm.contracts import Features
from mmllm.errors import UserError
from mmllm.registry import register


@register("connector", "linear")
class LinearConnector(FolderConnector):
    """One linear layer per token (LLaVA 1.0, arXiv 2304.08485). Class tokens before a grid are dropped."""

    def __init__(self, in_dim: int, out_dim: int, bias: bool = True):
        super().__init__("linear", in_dim, out_dim, bias=bias)
        self.linear = nn.Linear(in_dim, out_dim, bias=bias)

    def forward(self, features: Features, text: Features | None = None) -> tuple[Tensor, Tensor]:
        tokens, mask = self.content(features)
        return keep_mask(self.linear(tokens), mask)

    def num_tokens(self, grid_or_length: Any) -> int:
        return self.count(grid_or_length)


class MLP(nn.Sequential):
    """LayerNorm?, then ``depth`` linear layers with GELU between."""

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int, depth: int, norm: bool, dropout: float):
        layers: list[nn.Module] = [nn.LayerNorm(in_dim)] if norm else []
        width = in_dim
        for _ in range(depth - 1):
            layers += [Dropout(dropout), nn.Linear(width, hidden_dim), nn.GELU()]
            width = hidden_dim
        super().__init__(*layers, nn.Linear(width, out_dim))


@register("connector", "mlp")
class MLPConnector(FolderConnector):
    """An MLP per token (LLaVA 1.5, arXiv 2310.03744): ``depth`` linear layers with GELU between, optional LayerNorm."""

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        hidden_dim: int | None = None,
        depth: int = 2,
        norm: bool = False,
        dropout: float = 0.0,
    ):
        if depth < 1:
            raise UserError(f"depth must be at least 1 (got {depth})", "connector 'mlp'")
        super().__init__(
            "mlp", in_dim, out_dim, hidden_dim=hidden_dim or out_dim, depth=depth, norm=norm, dropout=dropout
        )
        self.mlp = MLP(in_dim, hidden_dim or out_dim, out_dim, depth, norm, dropout)

    def forward(self, features: Features, text: Features | None = None) -> tuple[Tensor, Tensor]:
        tokens, mask = self.content(features)
        return keep_mask(self.mlp(tokens), mask)

    def num_tokens(self, grid_or_length: Any) -> int:
        return self.count(grid_or_length)


@register("connector", "avg_pool")
class AvgPoolConnector(FolderConnector):
    """Averages ``stride`` neighbours (``stride`` x ``stride`` cells on a grid), then LayerNorm and an MLP.

    A last group that is not full averages over the valid tokens that it has, so n tokens become ceil(n / stride) and
    nothing is lost at the end of a sound. ``tokens`` instead of ``stride`` makes a fixed number of equal parts of
    the valid length; then every item has exactly that many tokens.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        stride: int = 2,
        tokens: int | None = None,
        hidden_dim: int | None = None,
        depth: int = 2,
        norm: bool = True,
        dropout: float = 0.0,
    ):
        if stride < 1 or (tokens is not None and tokens < 1):
            raise UserError("stride and tokens must be at least 1", "connector 'avg_pool'")
        super().__init__(
            "avg_pool",
            in_dim,
            out_dim,
            stride=stride,
            tokens=tokens,
            hidden_dim=hidden_dim or out_dim,
            depth=depth,
            norm=norm,
            dropout=dropout,
        )
        self.stride, self.fixed = stride, tokens
        self.mlp = MLP(in_dim, hidden_dim or out_dim, out_dim, depth, norm, dropout)

    def forward(self, features: Features, text: Features | None = None) -> tuple[Tensor, Tensor]:
        tokens, mask = self.content(features)
        if self.fixed is not None:
            tokens, mask = self._fixed_parts(tokens, mask)
        elif features.grid is not None:
            tokens, mask = self._grid(tokens, mask, features.grid)
        else:
            tokens, mask = self._line(tokens, mask)
        return keep_mask(self.mlp(tokens), mask)

    def _line(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        b, n, d = tokens.shape
        m = math.ceil(n / self.stride)
        pad = m * self.stride - n
        weight = F.pad(mask.to(tokens.dtype), (0, pad)).view(b, m, self.stride, 1)  # valid tokens come first
        total = (F.pad(tokens, (0, 0, 0, pad)).view(b, m, self.stride, d) * weight).sum(2)
        count = weight.sum(2)
        return total / count.clamp(min=1), count.squeeze(-1) > 0

    def _grid(self, tokens: Tensor, mask: Tensor, grid: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        t, h, w = grid
        b, _, d = tokens.shape
        weight = mask.to(tokens.dtype).view(b * t, 1, h, w)
        cells = tokens.reshape(b * t, h, w, d).permute(0, 3, 1, 2) * weight
        pool = {"kernel_size": self.stride, "stride": self.stride, "ceil_mode": True, "count_include_pad": False}
        total, count = F.avg_pool2d(cells, **pool), F.avg_pool2d(weight, **pool)
        pooled = (total / count.clamp(min=1e-6)).flatten(2).transpose(1, 2).reshape(b, -1, d)
        return pooled, (count > 0).reshape(b, -1)

    def _fixed_parts(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        b, n, _ = tokens.shape
        assert self.fixed is not None
        length = mask.sum(1).clamp(min=1)  # [B] valid tokens
        part = torch.arange(self.fixed, device=tokens.device)
        start = torch.div(part * length[:, None], self.fixed, rounding_mode="floor")  # [B, M]
        end = torch.maximum(torch.div((part + 1) * length[:, None], self.fixed, rounding_mode="floor"), start + 1)
        at = torch.arange(n, device=tokens.device)
        inside = ((at >= start[..., None]) & (at < end[..., None])).to(tokens.dtype)  # [B, M, N]
        pooled = inside @ tokens / inside.sum(-1, keepdim=True).clamp(min=1)
        return pooled, mask.any(1, keepdim=True).expand(b, self.fixed)

    def num_tokens(self, grid_or_length: Any) -> int:
        if self.fixed is not None:
            return self.fixed
        if isinstance(grid_or_length, (tuple, list)):
            t, h, w = grid_or_length
            return t * math.ceil(h / self.stride) * math.ceil(w / self.stride)
        return math.ceil(int(grid_or_length) / self.stride)

    def out_grid(self, grid: tuple[int, int, int] | None) -> tuple[int, int, int] | None:
        if grid is None or self.fixed is not None:
            return None
        return (grid[0], math.ceil(grid[1] / self.stride), math.ceil(grid[2] / self.stride))
