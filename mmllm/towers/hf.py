"""Any encoder of transformers as a tower: vision, audio and text models by local folder or hub id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    PreTrainedConfig,
)

from mmllm.contracts import Features, Tower
from mmllm.errors import UserError

PARTS = {"vision": "vision_config", "text": "text_config", "audio": "audio_config"}


def encoder_config(config: PreTrainedConfig, modality: str) -> PreTrainedConfig:
    """The part of a two-tower model's config (CLIP, SigLIP, CLAP) that describes one modality; others stay whole."""
    return getattr(config, PARTS[modality], None) or config


def encoder_of(model: Any) -> Any:
    """The encoder of an encoder-decoder model (Whisper); any other model as it is."""
    if getattr(model.config, "is_encoder_decoder", False):
        return model.get_encoder()
    return model


def encoder_class(config: PreTrainedConfig) -> type:
    """The class of the encoder inside an encoder-decoder model."""
    with torch.device("meta"):
        return type(encoder_of(AutoModel.from_config(config)))


class HFTower(Tower):
    """Common part: holds ``model``, builds it from a config dict, loads and saves it as a Hugging Face folder.

    Args:
        config: the model's own config as a dict (with ``model_type``).
        layer: which hidden state gives the tokens; -1 is the last output of the model, final norm included.
    """

    def __init__(
        self, config: dict[str, Any], layer: int = -1, model: nn.Module | None = None, source: str | None = None
    ):
        super().__init__()
        fields = {k: v for k, v in config.items() if k not in ("model_type", "transformers_version")}
        self.config = AutoConfig.for_model(config["model_type"], **fields)
        self.layer, self.source = layer, source
        # The whole class tree is kept for encoder-decoder models only as long as it takes to pick the encoder.
        self.model = encoder_of(AutoModel.from_config(self.config)) if model is None else model
        self.hidden_size = int(
            getattr(self.config, "hidden_size", 0) or getattr(self.config, "d_model", 0) or self.config.hidden_sizes[-1]
        )

    @classmethod
    def from_folder(cls, path: str, encoder_only: bool = False, **settings: Any) -> HFTower:
        """Loads weights from a local folder or hub id.

        Args:
            encoder_only: the folder holds just the encoder of an encoder-decoder model, as ``save_tower`` writes it.

        Raises:
            UserError: nothing loadable there.
        """
        try:
            config = encoder_config(AutoConfig.from_pretrained(path), cls.modality)
            model = (encoder_class(config) if encoder_only else AutoModel).from_pretrained(
                path, config=config, dtype=torch.float32
            )
        except (OSError, ValueError) as e:
            raise UserError(f"cannot load a {cls.modality} model: {str(e).splitlines()[0]}", path) from None
        return cls(config.to_dict(), model=encoder_of(model).eval(), source=path, **settings)

    def run(self, inputs: dict[str, Any]) -> tuple[Tensor, Any]:
        """Tokens of the chosen layer and the model's whole output."""
        out = self.model(**inputs, output_hidden_states=self.layer != -1)
        return (out.last_hidden_state if self.layer == -1 else out.hidden_states[self.layer]), out

    def to_config(self) -> dict[str, Any]:
        return {"model_type": "hf", "modality": self.modality, "layer": self.layer, "config": self.config.to_dict()}

    def save_pretrained(self, folder: str | Path) -> None:
        self.model.save_pretrained(folder)  # type: ignore[operator]
        self.preprocessor().save_pretrained(folder)

    def _source(self) -> str:
        if self.source is None:
            raise UserError(
                "this tower was built without weights and has no preprocessor",
                do="load it with load_tower",
            )
        return self.source


class HFVisionTower(HFTower):
    """Grid tokens of a vision transformer or CNN; class and register tokens serve ``pooled`` and are then dropped."""

    modality = "vision"

    def forward(self, pixel_values: Tensor, **_: Any) -> Features:
        tokens, out = self.run({"pixel_values": pixel_values.to(next(self.model.parameters()).dtype)})
        pooled = getattr(out, "pooler_output", None)
        if tokens.ndim == 4:  # a CNN's [B, D, h, w]
            grid = (1, tokens.shape[2], tokens.shape[3])
            tokens = tokens.flatten(2).transpose(1, 2)
        else:
            grid = self.grid
            prefix = tokens.shape[1] - grid[1] * grid[2]
            if prefix and pooled is None:
                pooled = tokens[:, 0]
            tokens = tokens[:, prefix:]
        pooled = tokens.mean(1) if pooled is None else pooled.flatten(1)
        return Features(tokens, torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device), pooled, grid=grid)

    @property
    def grid(self) -> tuple[int, int, int]:
        size = self.config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        patch = getattr(self.config, "patch_size", None) or 32  # CNNs of the ResNet kind reduce by 32
        patch = patch if isinstance(patch, int) else patch[0]
        return (1, height // patch, width // patch)

    def num_tokens(self, length: Any = None) -> int:
        return self.grid[1] * self.grid[2]

    def preprocessor(self) -> Any:
        return AutoImageProcessor.from_pretrained(self._source())


class HFAudioTower(HFTower):
    """Frame tokens of Whisper's encoder, AST or wav2vec 2.0; the input is whatever that model's extractor makes."""

    modality = "audio"

    def forward(self, input_features: Tensor, feature_attention_mask: Tensor | None = None, **_: Any) -> Features:
        kind, dtype = self.config.model_type, next(self.model.parameters()).dtype
        x = input_features.to(dtype)
        if kind == "whisper":
            tokens, out = self.run({"input_features": x})
        elif kind == "audio-spectrogram-transformer":
            tokens, out = self.run({"input_values": x})
        else:
            tokens, out = self.run({"input_values": x, "attention_mask": feature_attention_mask})
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        if feature_attention_mask is not None and kind != "audio-spectrogram-transformer":
            lengths = torch.tensor(
                [self.num_tokens(int(n)) for n in feature_attention_mask.sum(1)], device=tokens.device
            )
            mask = torch.arange(tokens.shape[1], device=tokens.device)[None] < lengths[:, None]
        weight = mask[..., None].to(tokens.dtype)
        return Features(tokens, mask, (tokens * weight).sum(1) / weight.sum(1).clamp(min=1))

    def num_tokens(self, length: Any = None) -> int:
        """Tokens for ``length`` valid input frames (samples for wav2vec 2.0); None means a full window."""
        c = self.config
        if c.model_type == "whisper":
            return c.max_source_positions if length is None else (int(length) - 1) // 2 + 1
        if c.model_type == "audio-spectrogram-transformer":
            down = lambda n, stride: (n - c.patch_size) // stride + 1  # noqa: E731
            return down(c.num_mel_bins, c.frequency_stride) * down(c.max_length, c.time_stride) + 2
        if length is None:
            raise UserError(f"{c.model_type} gives a number of tokens that depends on the sound's length")
        n = int(length)
        for kernel, stride in zip(c.conv_kernel, c.conv_stride):
            n = (n - kernel) // stride + 1
        return n

    def preprocessor(self) -> Any:
        return AutoFeatureExtractor.from_pretrained(self._source())


class HFTextTower(HFTower):
    """Token states of a text encoder; ``pooled`` is their mean over valid tokens (sentence-transformers' pooling)."""

    modality = "text"

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Features:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        tokens, _out = self.run({"input_ids": input_ids, "attention_mask": mask})
        weight = mask[..., None].to(tokens.dtype)
        pooled = (tokens * weight).sum(1) / weight.sum(1).clamp(min=1)
        return Features(tokens, mask.bool(), pooled, input_ids=input_ids)

    def encode(self, texts: list[str]) -> dict[str, Tensor]:
        """input_ids and attention_mask [B, L], cut at the model's longest input."""
        longest = min(getattr(self.config, "max_position_embeddings", 512), 512)
        out = self.preprocessor()(texts, padding=True, truncation=True, max_length=longest, return_tensors="pt")
        return {"input_ids": out["input_ids"], "attention_mask": out["attention_mask"]}

    def num_tokens(self, length: Any = None) -> int:
        return int(length or self.config.max_position_embeddings)

    def preprocessor(self) -> Any:
        if not hasattr(self, "_tokenizer"):
            self._tokenizer = AutoTokenizer.from_pretrained(self._source())
        return self._tokenizer
