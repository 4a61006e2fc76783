"""The frozen input embeddings of an LLM as a text tower: the targets of the alignment that makes the LLM see."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from mmllm.blocks.transformer import tapped
from mmllm.contracts import Features, Tower
from mmllm.errors import UserError


class WordEmbeddingTower(Tower):
    """Looks words up in an LLM's embedding table; ``pooled`` is the mean over a name's tokens.

    Names are tokenised as they stand inside a sentence, that is after a space.
    """

    modality = "text"

    def __init__(self, vocab_size: int, hidden_size: int, source: str | None = None):
        super().__init__()
        self.vocab_size, self.hidden_size, self.source = vocab_size, hidden_size, source
        # A frozen parameter, not a buffer: checkpoints keep buffers, and this table is known from its source.
        self.weight = nn.Parameter(torch.zeros(vocab_size, hidden_size), requires_grad=False)

    @classmethod
    def from_folder(cls, path: str) -> WordEmbeddingTower:
        """Reads the embedding table of the LLM in a local folder or of a hub id, as float32.

        Raises:
            UserError: no causal language model there.
        """
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
            table: Tensor = model.get_input_embeddings().weight
        except (OSError, ValueError) as e:
            raise UserError(f"cannot load a language model: {str(e).splitlines()[0]}", path) from None
        tower = cls(table.shape[0], table.shape[1], source=path)
        tower.weight.data.copy_(table.detach().float())
        return tower

    def encode(self, texts: list[str]) -> dict[str, Tensor]:
        """input_ids and attention_mask [B, L], right-padded with 0."""
        ids = [self.preprocessor()(" " + t.strip(), add_special_tokens=False)["input_ids"] for t in texts]
        longest = max((len(i) for i in ids), default=0)
        out = torch.zeros(len(ids), longest, dtype=torch.long)
        mask = torch.zeros(len(ids), longest, dtype=torch.long)
        for row, i in enumerate(ids):
            out[row, : len(i)], mask[row, : len(i)] = torch.tensor(i), 1
        return {"input_ids": out, "attention_mask": mask}

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, layers: Sequence[int] = (), **_: Any
    ) -> Features:
        """input_ids [B, L] -> tokens [B, L, hidden_size]; they are the only layer."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        tokens = self.weight[input_ids]
        weight = mask[..., None].to(tokens.dtype)
        pooled = (tokens * weight).sum(1) / weight.sum(1).clamp(min=1)
        return Features(tokens, mask.bool(), pooled, layers=tapped([tokens], layers), input_ids=input_ids)

    def num_tokens(self, length: Any = None) -> int:
        return int(length or 1)

    def to_config(self) -> dict[str, Any]:
        return {
            "model_type": "word_embeddings",
            "modality": "text",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
        }

    def save_pretrained(self, folder: str | Path) -> None:
        self.preprocessor().save_pretrained(folder)

    def preprocessor(self) -> Any:
        if not hasattr(self, "_tokenizer"):
            if self.source is None:
                raise UserError("word embeddings built without a source have no tokenizer", do="use load_tower")
            self._tokenizer = AutoTokenizer.from_pretrained(self.source)
        return self._tokenizer
