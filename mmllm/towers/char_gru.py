"""A text tower over characters, to train from scratch: a two-way GRU whose attention weighs each feature by itself.

Merkx and Frank, "Learning semantic sentence representations from visually grounded language without lexical knowledge"
(arXiv 1903.11393, section 3.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmllm.blocks.transformer import tapped
from mmllm.contracts import Features, Tower


class Characters:
    """Numbers of characters: 0 is padding; code points beyond ``size`` share the numbers of others."""

    mask_token_id = unk_token_id = None
    all_special_ids = (0,)

    def __init__(self, size: int, max_length: int):
        self.size, self.max_length = size, max_length

    def __len__(self) -> int:
        return self.size

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        """``input_ids`` of a text; an empty one is read as a space."""
        return {"input_ids": [1 + ord(c) % (self.size - 1) for c in text or " "]}

    def save_pretrained(self, folder: str | Path) -> None:
        """Nothing to write: the tower's config says all."""


class VectorAttention(nn.Module):
    """Weights over time for each feature: softmax of W2 tanh(W1 h), the sum of h by them (equation 2)."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.inner, self.outer = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """states [B, T, D], mask [B, T] bool -> [B, D]."""
        scores = self.outer(torch.tanh(self.inner(states))).masked_fill(~mask[..., None], -torch.inf)
        return (scores.softmax(1) * states).sum(1)


class CharGRUTower(Tower):
    """Characters -> embeddings -> two-way GRU -> vector attention; several attention heads stand side by side.

    The released code lets padding take part in the attention; here it does not.

    Args:
        hidden_size: of both directions together, even.
        attention_size: inner width of a head (128 in the paper).
        vocab_size: numbers for characters; those of code points beyond it are shared.
        max_length: longest text in characters; longer ones are cut.
    """

    modality = "text"

    def __init__(
        self,
        hidden_size: int = 2048,
        embedding_size: int = 20,
        attention_size: int = 128,
        heads: int = 1,
        vocab_size: int = 4096,
        max_length: int = 256,
    ):
        super().__init__()
        if hidden_size % 2:
            raise ValueError(f"hidden_size {hidden_size} is odd, and half of it goes each way")
        self.hidden_size, self.vocab_size, self.max_length = hidden_size, vocab_size, max_length
        self.settings = {"embedding_size": embedding_size, "attention_size": attention_size, "heads": heads}
        self.embedding = nn.Embedding(vocab_size, embedding_size, padding_idx=0)
        self.gru = nn.GRU(embedding_size, hidden_size // 2, batch_first=True, bidirectional=True)
        self.attention = nn.ModuleList(VectorAttention(hidden_size, attention_size) for _ in range(heads))

    @property
    def pooled_size(self) -> int:
        return self.hidden_size * len(self.attention)

    def encode(self, texts: list[str]) -> dict[str, Tensor]:
        """input_ids and attention_mask [B, T], right-padded with 0."""
        read = self.preprocessor()
        rows = [torch.tensor(read(t)["input_ids"][: self.max_length]) for t in texts]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True) if rows else torch.zeros(0, 1, dtype=torch.long)
        return {"input_ids": ids, "attention_mask": (ids > 0).long()}

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, layers: Sequence[int] = (), **_: Any
    ) -> Features:
        """input_ids [B, T], padded on the right -> tokens [B, T, hidden_size], pooled [B, heads * hidden_size]."""
        mask = input_ids > 0 if attention_mask is None else attention_mask.bool()
        x = self.embedding(input_ids)
        lengths = mask.sum(1).clamp(min=1)
        # The GRU's own kernel knows no lower precision everywhere.
        with torch.autocast(x.device.type, enabled=False):
            packed = nn.utils.rnn.pack_padded_sequence(
                x.to(self.gru.weight_ih_l0.dtype), lengths.cpu(), batch_first=True, enforce_sorted=False
            )
            tokens = nn.utils.rnn.pad_packed_sequence(self.gru(packed)[0], batch_first=True, total_length=x.shape[1])[0]
        readable = mask | (torch.arange(x.shape[1], device=x.device) < lengths[:, None])
        pooled = torch.cat([head(tokens, readable) for head in self.attention], -1)
        return Features(tokens, mask, pooled, layers=tapped([x, tokens], layers), input_ids=input_ids)

    def num_tokens(self, length: Any = None) -> int:
        return int(length or self.max_length)

    def to_config(self) -> dict[str, Any]:
        own = {"hidden_size": self.hidden_size, "vocab_size": self.vocab_size, "max_length": self.max_length}
        return {"model_type": "char_gru", "modality": "text", **own, **self.settings}

    def save_pretrained(self, folder: str | Path) -> None:
        self.preprocessor().save_pretrained(folder)

    def preprocessor(self) -> Characters:
        return Characters(self.vocab_size, self.max_length)
