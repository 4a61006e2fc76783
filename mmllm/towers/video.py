"""Video as frames through a picture tower, with a choice of how the frames are pooled over time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmllm.contracts import Features, Tower
from mmllm.errors import UserError, unknown

POOLINGS = ("mean", "attention")


class VideoTower(Tower):
    """Runs every frame through ``vision``; tokens of all frames lie on one grid (T, h, w).

    ``pooled`` is the mean over valid frames of their pooled features, or with ``attention`` their average weighted by
    a softmax over frames of a learned score of each; its start (all scores 0) is the mean.
    """

    modality = "video"

    def __init__(self, vision: Tower, pooling: str = "mean"):
        super().__init__()
        if pooling not in POOLINGS:
            raise unknown("temporal pooling", pooling, POOLINGS)
        if getattr(vision, "naflex", False):
            raise UserError("frames of one video need one size", "video tower", "use a tower of fixed picture size")
        self.vision, self.pooling = vision, pooling
        self.score: nn.Module | None = None
        if pooling == "attention":
            self.score = nn.Sequential(nn.LayerNorm(vision.pooled_size), nn.Linear(vision.pooled_size, 1))
            nn.init.zeros_(self.score[1].weight)  # type: ignore[arg-type]
            nn.init.zeros_(self.score[1].bias)  # type: ignore[arg-type]

    @property
    def hidden_size(self) -> int:  # type: ignore[override]
        return self.vision.hidden_size

    @property
    def pooled_size(self) -> int:
        return self.vision.pooled_size

    def forward(
        self, pixel_values: Tensor, frame_mask: Tensor | None = None, layers: Sequence[int] = (), **_: Any
    ) -> Features:
        """pixel_values [B, T, 3, H, W], frame_mask [B, T] bool -> tokens [B, T * N, D]; invalid frames never run."""
        batch, frames = pixel_values.shape[:2]
        valid = torch.ones(batch, frames, dtype=torch.bool) if frame_mask is None else frame_mask.bool()
        valid = valid.to(pixel_values.device)
        seen = self.vision(pixel_values=pixel_values[valid], layers=layers)

        def spread(x: Tensor) -> Tensor:
            """[frames that ran, ...] -> [B, T, ...], zeros where none ran."""
            out = x.new_zeros(batch, frames, *x.shape[1:])
            out[valid] = x
            return out

        tokens = spread(seen.tokens).flatten(1, 2)
        pooled = spread(seen.pooled)
        scores = pooled.new_zeros(batch, frames) if self.score is None else self.score(pooled)[..., 0]
        # The lowest finite score, and not -inf: a video without valid frames gives zeros instead of NaN.
        scores = scores.float().masked_fill(~valid, torch.finfo(torch.float32).min)
        weights = (scores.softmax(1) * valid).to(pooled.dtype)
        grid = None
        if seen.grid is not None and not seen.num_prefix:
            grid = (frames, *seen.grid[1:])
        states = seen.layers and {k: spread(v).flatten(1, 2) for k, v in seen.layers.items()}
        mask = spread(seen.mask).flatten(1, 2)
        return Features(tokens, mask, (weights[..., None] * pooled).sum(1), grid, layers=states)

    def gradient_checkpointing_enable(self) -> None:
        self.vision.gradient_checkpointing_enable()

    def num_tokens(self, length: Any = None) -> int:
        """Tokens of ``length`` frames; None means one."""
        return int(1 if length is None else length) * self.vision.num_tokens()

    def to_config(self) -> dict[str, Any]:
        return {
            "model_type": "video",
            "modality": "video",
            "pooling": self.pooling,
            "vision": self.vision.to_config(),
        }

    def preprocessor(self) -> Any:
        return self.vision.preprocessor()
