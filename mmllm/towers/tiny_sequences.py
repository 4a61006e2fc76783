"""Small transformers to train from scratch: over text as bytes (or any tokenizer's ids), and over log-mel frames."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoTokenizer, ByT5Tokenizer

from mmllm.blocks.pooling import masked_mean
from mmllm.blocks.transformer import Encoder
from mmllm.contracts import Features, Tower
from mmllm.towers.audio_features import MMLLMAudioFeatureExtractor

BYTES = 384  # ByT5's vocabulary: 3 special ids, 256 bytes, 125 spare ids


class TinyTextTower(Tower):
    """A bidirectional pre-norm transformer; ``pooled`` is the mean over valid tokens.

    Args:
        tokenizer: folder or hub id of any tokenizer of transformers; None reads UTF-8 bytes, which needs no files.
        vocab_size: None: the tokenizer's.
        max_length: longest input in tokens; longer texts are cut.
    """

    modality = "text"

    def __init__(
        self,
        vocab_size: int | None = None,
        hidden_size: int = 192,
        layers: int = 4,
        heads: int = 3,
        max_length: int = 128,
        tokenizer: str | None = None,
    ):
        super().__init__()
        self.source, self._tokenizer = tokenizer, None
        self.vocab_size = vocab_size or (len(self.preprocessor()) if tokenizer else BYTES)
        self.hidden_size, self.max_length = hidden_size, max_length
        self.settings = {"layers": layers, "heads": heads}
        self.token_embedding = nn.Embedding(self.vocab_size, hidden_size)
        self.position_embedding = nn.Parameter(torch.randn(1, max_length, hidden_size) * 0.02)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        self.encoder = Encoder(hidden_size, heads, layers)
        self.norm = nn.LayerNorm(hidden_size)

    def encode(self, texts: list[str]) -> dict[str, Tensor]:
        """input_ids and attention_mask [B, L], right-padded to the longest."""
        out = self.preprocessor()(
            texts, padding=True, padding_side="right", truncation=True, max_length=self.max_length, return_tensors="pt"
        )
        return {"input_ids": out["input_ids"], "attention_mask": out["attention_mask"]}

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, layers: Sequence[int] = (), **_: Any
    ) -> Features:
        """input_ids [B, L] -> tokens [B, L, hidden_size]."""
        mask = torch.ones_like(input_ids).bool() if attention_mask is None else attention_mask.bool()
        # Positions count valid tokens only, so that padding on the left changes nothing.
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        x = self.token_embedding(input_ids) + self.position_embedding[0, positions]
        out, states = self.encoder(x, mask, layers)
        tokens = self.norm(out)
        return Features(tokens, mask, masked_mean(tokens, mask), layers=states, input_ids=input_ids)

    def num_tokens(self, length: Any = None) -> int:
        return int(length or self.max_length)

    def to_config(self) -> dict[str, Any]:
        own = {"vocab_size": self.vocab_size, "hidden_size": self.hidden_size, "max_length": self.max_length}
        return {"model_type": "tiny_text", "modality": "text", **own, **self.settings}

    def save_pretrained(self, folder: str | Path) -> None:
        self.preprocessor().save_pretrained(folder)

    def preprocessor(self) -> Any:
        if self._tokenizer is None:
            self._tokenizer = AutoTokenizer.from_pretrained(self.source) if self.source else ByT5Tokenizer()
        return self._tokenizer


class TinyAudioTransformer(Tower):
    """Two convolutions over log-mel frames, then a pre-norm transformer; one token per four frames.

    Frames outside the sound are zeroed before the convolutions and never looked at, so what pads a sound does not
    count. ``pooled`` is the mean over valid tokens.
    """

    modality = "audio"

    def __init__(
        self,
        num_mel_bins: int = 64,
        hidden_size: int = 192,
        layers: int = 4,
        heads: int = 3,
        max_seconds: float = 4.0,
        hop_seconds: float = 0.01,
    ):
        super().__init__()
        self.num_mel_bins, self.hidden_size = num_mel_bins, hidden_size
        self.settings = {"layers": layers, "heads": heads, "max_seconds": max_seconds, "hop_seconds": hop_seconds}
        self.max_frames = round(max_seconds / hop_seconds)
        self.conv1 = nn.Conv1d(num_mel_bins, hidden_size, 3, 2, 1)
        self.conv2 = nn.Conv1d(hidden_size, hidden_size, 3, 2, 1)
        self.position_embedding = nn.Parameter(torch.randn(1, self.num_tokens(), hidden_size) * 0.02)
        self.encoder = Encoder(hidden_size, heads, layers)
        self.norm = nn.LayerNorm(hidden_size)

    def forward(
        self,
        input_features: Tensor,
        feature_attention_mask: Tensor | None = None,
        layers: Sequence[int] = (),
        **_: Any,
    ) -> Features:
        """input_features [B, mel, T] log power, mask [B, T] with the sound first -> tokens [B, ceil(T / 4), D]."""
        x = input_features.float()
        frames = x.new_ones(len(x), x.shape[-1]) if feature_attention_mask is None else feature_attention_mask.float()
        weight = frames[:, None] / (frames.sum(1) * x.shape[1]).clamp(min=1)[:, None, None]
        mean = (x * weight).sum((1, 2), keepdim=True)
        deviation = ((x - mean).square() * weight).sum((1, 2), keepdim=True).sqrt().clamp(min=1e-3)
        x = ((x - mean) / deviation * frames[:, None]).to(self.conv1.weight.dtype)
        half = frames[:, None, ::2].to(x.dtype)
        x = F.gelu(self.conv2(F.gelu(self.conv1(x)) * half)).transpose(1, 2)
        mask = frames[:, ::4].bool()
        out, states = self.encoder(x + self.position_embedding[:, : x.shape[1]], mask, layers)
        tokens = self.norm(out)
        return Features(tokens, mask, masked_mean(tokens, mask), layers=states)

    def num_tokens(self, length: Any = None) -> int:
        """Tokens for ``length`` valid frames; None means the whole window."""
        return -(-int(self.max_frames if length is None else length) // 4)

    def to_config(self) -> dict[str, Any]:
        own = {"num_mel_bins": self.num_mel_bins, "hidden_size": self.hidden_size}
        return {"model_type": "tiny_audio_transformer", "modality": "audio", **own, **self.settings}

    def preprocessor(self) -> MMLLMAudioFeatureExtractor:
        seconds, hop = self.settings["max_seconds"], self.settings["hop_seconds"]
        return MMLLMAudioFeatureExtractor(
            feature_size=self.num_mel_bins, max_seconds=seconds, hop_seconds=hop, centre=False
        )
