"""The sequence connector: one token for each step of a video, and a transformer that knows their order."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn, zeros

from mmllm.blocks.pooling import masked_mean
from mmllm.blocks.transformer import Encoder
from mmllm.connectors.base import FolderConnector, keep_mask
from mmllm.contracts import Features
from mmllm.errors import UserError
from mmllm.registry import register


@register("connector", "sequence")
class SequenceConnector(FolderConnector):
    """Averages each frame's tokens, adds its place in time and lets the frames look at each other.

    Args:
        frames: steps of the sequence; the tower's tokens are as many equal parts of its tokens, in order.
        hidden_dim, layers, heads: of the transformer.
    """

    def __init__(
        self, in_dim: int, out_dim: int, frames: int = 8, hidden_dim: int = 128, layers: int = 2, heads: int = 4
    ):
        options = {"frames": frames, "hidden_dim": hidden_dim, "layers": layers, "heads": heads}
        if frames < 1 or hidden_dim % heads:
            raise UserError("frames must be at least 1 and hidden_dim a multiple of heads", "connector 'sequence'")
        super().__init__("sequence", in_dim, out_dim, **options)
        self.frames = frames
        self.into = nn.Sequential(nn.LayerNorm(in_dim), nn.Linear(in_dim, hidden_dim))
        self.position_embedding = nn.Parameter(zeros(1, frames, hidden_dim))
        nn.init.normal_(self.position_embedding, std=0.02)
        self.encoder = Encoder(hidden_dim, heads, layers)
        self.out = nn.Sequential(nn.LayerNorm(hidden_dim), nn.Linear(hidden_dim, out_dim))

    def forward(self, features: Features, text: Features | None = None) -> tuple[Tensor, Tensor]:
        """Tokens [B, frames, out_dim] and which frames there are."""
        tokens, mask = self.content(features)
        if tokens.shape[1] % self.frames:
            what = f"{tokens.shape[1]} tokens are not {self.frames} equal parts"
            raise UserError(what, "connector 'sequence'", "set its frames to those of the source")
        parts = mask.unflatten(1, (self.frames, -1))
        steps, there = masked_mean(tokens.unflatten(1, (self.frames, -1)), parts), parts.any(-1)
        x, _ = self.encoder(self.into(steps) + self.position_embedding, there)
        return keep_mask(self.out(x), there)

    def num_tokens(self, grid_or_length: Any) -> int:
        return self.frames
