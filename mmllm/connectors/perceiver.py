"""The perceiver resampler: learned latents read tower tokens and one another (Flamingo, 2204.14198, section 2.2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmllm.blocks.cross_attention import CrossAttention, feed_forward
from mmllm.connectors.base import FolderConnector, GridPositions
from mmllm.contracts import Features
from mmllm.errors import UserError
from mmllm.registry import register


class _Layer(nn.Module):
    """Latents look at media tokens and latents together, then a feed-forward; pre-norm with residuals."""

    def __init__(self, dim: int, heads: int, dropout: float):
        super().__init__()
        self.norm_media, self.norm_latents = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = CrossAttention(dim, dim, heads)
        self.norm_mlp, self.mlp = nn.LayerNorm(dim), feed_forward(dim, dropout)

    def forward(self, x: Tensor, media: Tensor, allowed: Tensor) -> Tensor:
        """x [B, K, D], media [B, N, D], allowed [B, N + K] -> [B, K, D]."""
        y = self.norm_latents(x)
        x = x + self.attention(y, torch.cat([self.norm_media(media), y], 1), allowed)
        return x + self.mlp(self.norm_mlp(x))


@register("connector", "perceiver")
class PerceiverConnector(FolderConnector):
    """``num_latents`` learned latents read all tokens of an input, video frames included, in ``num_layers`` layers.

    Always gives ``num_latents`` tokens. Tokens are first brought to ``hidden_dim``.

    Args:
        frames: most frames of an input; each frame's number then has a learned vector that is added to its tokens
            (starting at zero). 0: frames are not told apart.
        positions: adds vectors of row and column to the tower's tokens, for towers that don't know places by themselves
            (convolutions); grid: how many there are.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        num_latents: int = 64,
        num_layers: int = 2,
        hidden_dim: int = 256,
        num_heads: int = 4,
        frames: int = 0,
        dropout: float = 0.0,
        positions: bool = False,
        grid: tuple[int, int] | list[int] | None = None,
    ):
        if hidden_dim % num_heads:
            raise UserError(
                f"hidden_dim {hidden_dim} is not a multiple of num_heads {num_heads}", "connector 'perceiver'"
            )
        if min(num_latents, num_layers) < 1 or frames < 0:
            raise UserError("num_latents and num_layers must be at least 1, frames 0", "connector 'perceiver'")
        super().__init__(
            "perceiver",
            in_dim,
            out_dim,
            num_latents=num_latents,
            num_layers=num_layers,
            hidden_dim=hidden_dim,
            num_heads=num_heads,
            frames=frames,
            dropout=dropout,
            **({"positions": True, "grid": list(grid)} if positions and grid is not None else {}),
        )
        self.num_latents = num_latents
        self.latents = nn.Parameter(torch.randn(num_latents, hidden_dim) * 0.02)
        self.frames = nn.Parameter(torch.zeros(frames, hidden_dim)) if frames else None
        self.positions = GridPositions(hidden_dim, grid, "perceiver") if positions else None
        self.norm_in, self.proj_in = nn.LayerNorm(in_dim), nn.Linear(in_dim, hidden_dim)
        self.layers = nn.ModuleList(_Layer(hidden_dim, num_heads, dropout) for _ in range(num_layers))
        self.norm_out, self.out = nn.LayerNorm(hidden_dim), nn.Linear(hidden_dim, out_dim)

    def forward(self, features: Features, text: Features | None = None) -> tuple[Tensor, Tensor]:
        """Tower features of B inputs -> tokens [B, num_latents, out_dim] and mask.

        Raises:
            UserError: more frames than ``frames``.
        """
        grid = features.grid if self.frames is not None else None
        # Without frame vectors class tokens stay: latents can use them, and they cost no output token.
        kept = Features(features.tokens, features.mask, features.pooled, grid, features.num_prefix if grid else 0)
        tokens, mask = self.content(kept)
        media = self.proj_in(self.norm_in(tokens))
        if self.frames is not None and grid is not None:
            if grid[0] > len(self.frames):
                raise UserError(f"{grid[0]} frames, the connector knows {len(self.frames)}", do="raise its frames")
            media = media + self.frames[: grid[0]].repeat_interleave(grid[1] * grid[2], 0)
        if self.positions is not None:
            media = self.positions(media, features.grid, 0 if grid else features.num_prefix)
        x = self.latents.expand(len(media), -1, -1)
        allowed = torch.cat([mask, mask.new_ones(x.shape[:2])], 1)
        for layer in self.layers:
            x = layer(x, media, allowed)
        return self.out(self.norm_out(x)), mask.any(1, keepdim=True).expand(-1, self.num_latents)

    def num_tokens(self, grid_or_length: Any) -> int:
        return self.num_latents

    def out_grid(self, grid: tuple[int, int, int] | None) -> None:
        """None: a token belongs to no place."""
