"""Any sound encoder of transformers as a tower: Whisper, AST, CLAP, and wav2vec 2.0 with its kin (HuBERT, WavLM)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmllm.blocks.pooling import masked_mean
from mmllm.contracts import Features
from mmllm.errors import UserError
from mmllm.towers.hf import HFTower
from mmllm.towers.preprocessing import load_preprocessor

AST, CLAP = "audio-spectrogram-transformer", "clap_audio_model"


class HFAudioTower(HFTower):
    """Frame tokens, with a mask of those that hold sound; the input is whatever the model's own extractor makes.

    ``pooled`` is the model's own pooled output (``pooler``: CLAP, AST) or the mean of the tokens that hold sound
    (``mean``); ``auto`` takes the first that the model has.

    Args:
        max_seconds: cuts sounds for models of raw waveforms, whose extractors take any length; None: no limit.
    """

    modality = "audio"

    def __init__(self, config: dict[str, Any], max_seconds: float | None = None, **settings: Any):
        super().__init__(config, **settings)
        self.max_seconds = max_seconds

    def default_pooling(self) -> str:
        return "pooler" if self.config.model_type in (AST, CLAP) else "mean"

    def forward(
        self,
        input_features: Tensor,
        feature_attention_mask: Tensor | None = None,
        is_longer: Tensor | None = None,
        layers: Sequence[int] = (),
        **_: Any,
    ) -> Features:
        """Whatever the extractor makes [B, ...], mask [B, frames or samples] -> tokens [B, N, D]."""
        kind, x = self.config.model_type, input_features.to(next(self.model.parameters()).dtype)
        if kind == CLAP:
            return self._clap(x, is_longer, layers)
        if kind == AST:
            tokens, out, states = self.run({"input_values": x}, layers)
        elif kind == "whisper":
            tokens, out, states = self.run({"input_features": x}, layers)
        else:
            tokens, states = self._waveforms(x, feature_attention_mask, layers)
            out = None
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        if feature_attention_mask is not None:
            frames = feature_attention_mask.sum(1).tolist()
            mask = torch.stack([self._valid(int(n), tokens.shape[1]) for n in frames]).to(tokens.device)
        pooled = masked_mean(tokens, mask) if self.pooling == "mean" else self.pooler_output(out)
        if kind == AST:
            return Features(tokens, mask, pooled, (1, *self._ast_grid()), num_prefix=2, layers=states)
        return Features(tokens, mask, pooled, layers=states)

    def _clap(self, x: Tensor, is_longer: Tensor | None, layers: Sequence[int]) -> Features:
        longer = torch.zeros(len(x), 1, dtype=torch.bool, device=x.device) if is_longer is None else is_longer
        tokens, out, states = self.run({"input_features": x, "is_longer": longer}, layers)
        grid = (1, tokens.shape[2], tokens.shape[3])
        flat = lambda t: t.flatten(2).transpose(1, 2)  # noqa: E731
        tokens = flat(tokens)
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        pooled = out.pooler_output if self.pooling == "pooler" else tokens.mean(1)
        return Features(tokens, mask, pooled, grid, layers=states and {k: flat(v) for k, v in states.items()})

    def _waveforms(
        self, x: Tensor, samples: Tensor | None, layers: Sequence[int]
    ) -> tuple[Tensor, dict[int, Tensor] | None]:
        """wav2vec 2.0 and its kin: samples [B, T] -> tokens [B, N, D] and taps; what pads a sound changes nothing."""
        name = self.model.main_input_name
        if samples is None or getattr(self.config, "feat_extract_norm", "layer") != "group" or bool(samples.all()):
            tokens, _, states = self.run({name: x, "attention_mask": samples}, layers)
            return tokens, states
        # Group norm takes its statistics over time, padding included, and knows no mask: equal lengths run together.
        lengths = samples.sum(1)
        rows: list[Tensor] = [x.new_empty(0)] * len(x)
        taps: list[dict[int, Tensor]] = [{}] * len(x)
        for length in lengths.unique().tolist():
            chosen = (lengths == length).nonzero().flatten().tolist()
            tokens, _, states = self.run({name: x[chosen, : int(length)]}, layers)
            for i, row in enumerate(chosen):
                rows[row], taps[row] = tokens[i], {k: v[i] for k, v in (states or {}).items()}
        pad = lambda many: torch.nn.utils.rnn.pad_sequence(many, batch_first=True)  # noqa: E731
        return pad(rows), {k: pad([t[k] for t in taps]) for k in taps[0]} or None

    def _valid(self, length: int, count: int) -> Tensor:
        """[count] bool: the tokens of a sound of ``length`` valid frames or samples."""
        if self.config.model_type != AST:
            return torch.arange(count) < self.num_tokens(length)
        rows, columns = self._ast_grid()
        heard = torch.arange(columns) < self._ast_columns(length)
        return torch.cat([torch.ones(2, dtype=torch.bool), heard.repeat(rows)])

    def _ast_grid(self) -> tuple[int, int]:
        """Frequency and time patches."""
        c = self.config
        down = lambda n, stride: (n - c.patch_size) // stride + 1  # noqa: E731
        return down(c.num_mel_bins, c.frequency_stride), down(c.max_length, c.time_stride)

    def _ast_columns(self, frames: int) -> int:
        """Time patches that begin within the sound, at least one."""
        return min(self._ast_grid()[1], max(1, -(-frames // self.config.time_stride)))

    def num_tokens(self, length: Any = None) -> int:
        """Tokens for ``length`` valid input frames (samples for wav2vec 2.0); None means a full window."""
        c = self.config
        if c.model_type == "whisper":
            return c.max_source_positions if length is None else (int(length) - 1) // 2 + 1
        if c.model_type == AST:
            rows, columns = self._ast_grid()
            return rows * (columns if length is None else self._ast_columns(int(length))) + 2
        if c.model_type == CLAP:
            stride = c.patch_stride if isinstance(c.patch_stride, int) else c.patch_stride[0]
            return (c.spec_size // 2 ** (len(c.depths) - 1) // stride) ** 2
        if length is None:
            raise UserError(f"{c.model_type} gives a number of tokens that depends on the sound's length")
        n = int(length)
        for kernel, stride in zip(getattr(c, "conv_kernel", ()), getattr(c, "conv_stride", ())):
            n = (n - kernel) // stride + 1
        return n

    def to_config(self) -> dict[str, Any]:
        return {**super().to_config(), "max_seconds": self.max_seconds}

    def load_preprocessor(self, source: str) -> Any:
        made = load_preprocessor(source, "audio")
        if self.max_seconds is not None:
            made.max_seconds = self.max_seconds
        return made
