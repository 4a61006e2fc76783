"""Small towers of pictures and sounds to train from scratch: a ViT, and the audio tower of the starter recipe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmllm.blocks.transformer import Encoder, tapped
from mmllm.contracts import Features, Tower
from mmllm.towers.audio_features import MMLLMAudioFeatureExtractor
from mmllm.towers.image_processing import MMLLMImageProcessor


class TinyViTTower(Tower):
    """A plain pre-norm vision transformer; ``pooled`` is the mean of the tokens."""

    modality = "vision"

    def __init__(
        self, image_size: int = 64, patch_size: int = 8, hidden_size: int = 192, layers: int = 6, heads: int = 3
    ):
        super().__init__()
        self.image_size, self.patch_size, self.hidden_size = image_size, patch_size, hidden_size
        self.settings = {"layers": layers, "heads": heads}
        side = image_size // patch_size
        self.patch_embedding = nn.Conv2d(3, hidden_size, patch_size, patch_size)
        self.position_embedding = nn.Parameter(torch.randn(1, side * side, hidden_size) * 0.02)
        self.encoder = Encoder(hidden_size, heads, layers)
        self.norm = nn.LayerNorm(hidden_size)

    def forward(self, pixel_values: Tensor, layers: Sequence[int] = (), **_: Any) -> Features:
        """pixel_values [B, 3, image_size, image_size] -> tokens [B, (image_size / patch_size)^2, hidden_size]."""
        x = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype)).flatten(2).transpose(1, 2)
        out, states = self.encoder(x + self.position_embedding, taps=layers)
        tokens = self.norm(out)
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        return Features(tokens, mask, tokens.mean(1), grid=self.grid, layers=states)

    @property
    def grid(self) -> tuple[int, int, int]:
        side = self.image_size // self.patch_size
        return (1, side, side)

    def num_tokens(self, length: Any = None) -> int:
        return self.grid[1] * self.grid[2]

    def to_config(self) -> dict[str, Any]:
        own = {"image_size": self.image_size, "patch_size": self.patch_size, "hidden_size": self.hidden_size}
        return {"model_type": "tiny_vit", "modality": "vision", **own, **self.settings}

    def preprocessor(self) -> MMLLMImageProcessor:
        return MMLLMImageProcessor(image_size=self.image_size)


class ConvBlock(nn.Module):
    """1-D convolution of width 5 with BatchNorm and GELU; a residual path where the shape allows it."""

    def __init__(self, width_in: int, width_out: int, stride: int):
        super().__init__()
        self.conv, self.norm = nn.Conv1d(width_in, width_out, 5, stride, 2), nn.BatchNorm1d(width_out)
        self.residual = stride == 1 and width_in == width_out

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.norm(self.conv(x)))
        return h + x if self.residual else h


class _Turned(torch.autograd.Function):
    """[B, C, T] -> [B, T, C], laid out anew both ways: norms and convolutions are slow on strided memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.transpose(1, 2).contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad.transpose(1, 2).contiguous()


class TinyAudioTower(Tower):
    """1-D convolutions over log-mel frames; one token per four frames of a fixed window.

    The window is heard as a whole, silence included, so every token is valid. ``pooled`` comes from four learned
    attention maps over the tokens and their maximum.
    """

    modality = "audio"

    def __init__(
        self,
        num_mel_bins: int = 48,
        hidden_size: int = 256,
        max_seconds: float = 1.92,
        hop_seconds: float = 0.015,
        depth: int = 1,
    ):
        super().__init__()
        self.num_mel_bins, self.hidden_size, self.depth = num_mel_bins, hidden_size, depth
        self.max_seconds, self.hop_seconds = max_seconds, hop_seconds
        half, three_quarters = hidden_size // 2, hidden_size * 3 // 4
        self.stem = nn.Sequential(
            ConvBlock(num_mel_bins, half, 1),
            ConvBlock(half, three_quarters, 2),
            ConvBlock(three_quarters, hidden_size, 2),
        )
        self.layers = nn.Sequential(*(ConvBlock(hidden_size, hidden_size, 1) for _ in range(depth)))
        self.attention = nn.Conv1d(hidden_size, 4, 1)
        self.pool = nn.Linear(5 * hidden_size, hidden_size)

    @property
    def blocks(self) -> list[nn.Module]:
        """The convolutions from first to last, for ``train: {last_n: k}``."""
        return [*self.stem, *self.layers]

    def forward(
        self,
        input_features: Tensor,
        feature_attention_mask: Tensor | None = None,
        layers: Sequence[int] = (),
        **_: Any,
    ) -> Features:
        """input_features [B, mel, T] log power -> tokens [B, ceil(T / 4), hidden_size].

        Layer 0 is the output of the stem, k that of residual block k.
        """
        x = input_features.float()
        # The level and contrast of a recording say nothing about the word: each item gets mean 0 and deviation 1.
        x = (x - x.mean((1, 2), keepdim=True)) / x.std((1, 2), keepdim=True).clamp(min=1e-3)
        h = self.stem(x.to(self.pool.weight.dtype))
        states = [h.transpose(1, 2)]
        for block in self.layers:
            h = block(h)
            states.append(h.transpose(1, 2))
        weights = self.attention(h).softmax(-1)
        attended = torch.einsum("bkt,bct->bkc", weights, h).flatten(1)
        pooled = self.pool(torch.cat([attended, h.amax(-1)], 1))
        tokens = _Turned.apply(h)
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        return Features(tokens, mask, pooled, layers=tapped(states, layers))

    def num_tokens(self, length: Any = None) -> int:
        """Always the tokens of the whole window."""
        frames = round(self.max_seconds / self.hop_seconds)
        return (frames + 3) // 4

    def to_config(self) -> dict[str, Any]:
        own = {"num_mel_bins": self.num_mel_bins, "hidden_size": self.hidden_size, "depth": self.depth}
        return {
            "model_type": "tiny_audio",
            "modality": "audio",
            **own,
            "max_seconds": self.max_seconds,
            "hop_seconds": self.hop_seconds,
        }

    def preprocessor(self) -> MMLLMAudioFeatureExtractor:
        return MMLLMAudioFeatureExtractor(
            feature_size=self.num_mel_bins, max_seconds=self.max_seconds, hop_seconds=self.hop_seconds
        )
