"""Token merging: the most alike tokens become one, until few enough are left (ToMe, arXiv 2210.09461), then an MLP."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmllm.connectors.base import FolderConnector, keep_mask
from mmllm.connectors.simple import MLP
from mmllm.contracts import Features
from mmllm.errors import UserError
from mmllm.registry import register


def merge_round(x: Tensor, size: Tensor, mask: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One round of bipartite soft matching (section 3 of the paper): at most half of each row's tokens are merged.

    Tokens at even places each look for the token at an odd place that is most like them (cosine); the best pairs
    become one token, the mean of all the original tokens in it. Order is kept: merged tokens stand where the odd ones
    stood.

    Args:
        x: [B, N, D]; size: [B, N] original tokens in each; mask: [B, N], valid tokens first.
        target: [B] wanted number of valid tokens.

    Returns:
        The same three, valid tokens first.
    """
    b, n, d = x.shape
    with torch.no_grad():
        valid = mask.sum(1)
        many = (valid - target).clamp(min=0).minimum(valid // 2)  # [B] merges of this round
        unit = F.normalize(x.float(), dim=-1)
        scores = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)  # [B, even, odd]
        scores = scores.masked_fill(~(mask[:, ::2, None] & mask[:, None, 1::2]), -torch.inf)
        best, partner = scores.max(-1)
        rank = best.argsort(dim=-1, descending=True, stable=True).argsort(-1)
        merged = rank < many[:, None]  # [B, even]
        goes_to = torch.arange(n, device=x.device).expand(b, n).clone()
        goes_to[:, ::2] = torch.where(merged, 2 * partner + 1, goes_to[:, ::2])
        stays = mask.clone()
        stays[:, ::2] &= ~merged
        place = stays.long().cumsum(1) - 1  # of a token that stays, in the result
        to = place.gather(1, goes_to).clamp(min=0)
        left = int((valid - many).max())
    weight = size * mask.to(size.dtype)
    total = x.new_zeros(b, left, d).scatter_add(1, to[..., None].expand_as(x), x * weight[..., None])
    size = size.new_zeros(b, left).scatter_add(1, to, weight)
    return total / size.clamp(min=1)[..., None], size, size > 0


@register("connector", "token_merge")
class TokenMergeConnector(FolderConnector):
    """Merges alike tokens until ``tokens`` are left, or the share ``keep`` of them (rounded up), in each frame.

    An input of n tokens gives min(n, tokens), or ceil(n * keep).

    Args:
        tokens: most tokens of a frame (or of an input off a grid); wins over ``keep``.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        keep: float = 0.25,
        tokens: int | None = None,
        hidden_dim: int | None = None,
        depth: int = 2,
        norm: bool = True,
        dropout: float = 0.0,
    ):
        if not 0 < keep <= 1 or (tokens is not None and tokens < 1) or depth < 1:
            raise UserError("keep must lie in (0, 1], tokens and depth must be at least 1", "connector 'token_merge'")
        hidden = hidden_dim or out_dim
        super().__init__(
            "token_merge",
            in_dim,
            out_dim,
            keep=keep,
            tokens=tokens,
            hidden_dim=hidden,
            depth=depth,
            norm=norm,
            dropout=dropout,
        )
        self.keep, self.most = keep, tokens
        self.mlp = MLP(in_dim, hidden, out_dim, depth, norm, dropout)

    def left(self, n: int) -> int:
        """How many of a frame's n tokens are left."""
        # Rounded at nine digits first: 0.07 of 100 is 7, not the 8 that its binary fraction would give.
        return min(n, self.most) if self.most is not None else math.ceil(round(n * self.keep, 9))

    def forward(self, features: Features, text: Features | None = None) -> tuple[Tensor, Tensor]:
        x, mask = keep_mask(*self.content(features))
        b, _, d = x.shape
        frames = features.grid[0] if features.grid is not None else 1
        x, mask = x.reshape(b * frames, -1, d), mask.reshape(b * frames, -1)
        size = mask.to(x.dtype)
        target = torch.tensor([self.left(int(n)) for n in mask.sum(1)], device=x.device)
        while bool((mask.sum(1) > target).any()):
            x, size, mask = merge_round(x, size, mask, target)
        x, mask = x.reshape(b, -1, d), mask.reshape(b, -1)
        return keep_mask(self.mlp(x), mask)

    def num_tokens(self, grid_or_length: Any) -> int:
        if isinstance(grid_or_length, (tuple, list)):
            t, h, w = grid_or_length
            return t * self.left(h * w)
        return self.left(int(grid_or_length))

    def out_grid(self, grid: tuple[int, int, int] | None) -> None:
        """None: a token belongs to no place."""
