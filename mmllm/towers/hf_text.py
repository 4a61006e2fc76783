"""Any text encoder or decoder LM of transformers as a tower."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING, AutoTokenizer, PreTrainedConfig

from mmllm.blocks.pooling import masked_mean
from mmllm.contracts import Features
from mmllm.errors import UserError
from mmllm.towers.hf import HFTower


def is_decoder(config: PreTrainedConfig) -> bool:
    """Whether a config belongs to a causal language model (GPT, Llama) and not to an encoder that can be made one."""
    causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and type(config) not in MODEL_FOR_MASKED_LM_MAPPING
    return causal and not config.is_encoder_decoder


class HFTextTower(HFTower):
    """Token states of a text encoder or of a decoder LM.

    ``pooled`` is the mean over valid tokens (``mean``, sentence-transformers' pooling), the last valid token
    (``last``), the first one (``cls``), or the model's own pooled output (``pooler``). ``auto`` is ``last`` for a
    decoder LM, ``pooler`` for the text half of a two-tower model (CLIP, SigLIP, CLAP), ``mean`` for any other encoder:
    BERT's pooler was trained for next-sentence prediction.

    Args:
        max_length: longest input in tokens; None: the model's own, at most 512.
    """

    modality = "text"
    POOLINGS = ("auto", "pooler", "mean", "last", "cls")

    def __init__(self, config: dict[str, Any], max_length: int | None = None, **settings: Any):
        super().__init__(config, **settings)
        own = int(getattr(self.config, "max_position_embeddings", None) or 512)
        self.max_length = max_length or min(own, 512)
        self.decoder = is_decoder(self.config)
        self._asked = frozenset(inspect.signature(self.model.forward).parameters)

    def default_pooling(self) -> str:
        if is_decoder(self.config):
            return "last"
        return "pooler" if self.config.model_type.endswith("_text_model") else "mean"

    @property
    def pooled_size(self) -> int:
        head = self.siglip and self.pooling == "pooler"
        return int(self.config.projection_size) if head else self.hidden_size

    @property
    def siglip(self) -> bool:
        """SigLIP's text halves look at padding and pool its last token, so texts are always padded to full length."""
        return self.config.model_type in ("siglip_text_model", "siglip2_text_model")

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, layers: Sequence[int] = (), **_: Any
    ) -> Features:
        """input_ids and attention_mask [B, L], padded on either side -> tokens [B, L, D]."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        inputs: dict[str, Any] = {"input_ids": input_ids}
        if not self.siglip:
            inputs["attention_mask"] = mask
        if self.decoder:
            # Absolute positions (GPT-2) must not count padding on the left.
            inputs |= {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if "position_ids" in self._asked else {}
            inputs |= {"use_cache": False} if "use_cache" in self._asked else {}
        tokens, out, states = self.run(inputs, layers)
        valid = mask.bool()
        if self.pooling == "pooler":
            pooled = self.pooler_output(out)
        elif self.pooling == "mean":
            pooled = masked_mean(tokens, valid)
        else:
            places = torch.arange(mask.shape[1], device=mask.device)
            at = (valid * (places + 1 if self.pooling == "last" else mask.shape[1] - places)).argmax(1)
            pooled = tokens[torch.arange(len(at), device=at.device), at]
        return Features(tokens, valid, pooled, layers=states, input_ids=input_ids)

    def encode(self, texts: list[str]) -> dict[str, Tensor]:
        """input_ids and attention_mask [B, L], padded on the right to the longest, cut at ``max_length``."""
        out = self.preprocessor()(
            texts,
            padding="max_length" if self.siglip else True,
            padding_side="right",
            truncation=True,
            max_length=self.max_length,
            return_attention_mask=True,
            return_tensors="pt",
        )
        return {"input_ids": out["input_ids"], "attention_mask": out["attention_mask"]}

    def num_tokens(self, length: Any = None) -> int:
        return int(length or self.max_length)

    def to_config(self) -> dict[str, Any]:
        return {**super().to_config(), "max_length": self.max_length}

    def load_preprocessor(self, source: str) -> Any:
        try:
            tokenizer = AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError, ImportError) as e:
            raise UserError(f"cannot load its tokenizer ({str(e).strip().splitlines()[0]})", source) from None
        if tokenizer.pad_token is None:  # decoder LMs often come without one; padding is masked, so any will do
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        return tokenizer
