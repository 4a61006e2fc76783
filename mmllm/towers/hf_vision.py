"""Any picture encoder of transformers or timm as a tower: tokens on their grid, class tokens, NaFlex masks."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmllm.blocks.pooling import masked_mean
from mmllm.contracts import Features
from mmllm.errors import UserError
from mmllm.towers.hf import HFTower
from mmllm.towers.preprocessing import load_preprocessor, set_image_size, timm_processor


class HFVisionTower(HFTower):
    """Grid tokens of a vision transformer or CNN.

    ``pooled`` is the model's own pooled output (``pooler``), else its class token (``cls``), else the mean of the grid
    tokens (``mean``); ``auto`` takes the first that the model has.

    Args:
        image_size: side of the pictures that the preprocessor makes; None: the model's own.
        keep_prefix: leave class and register tokens before the grid tokens (``Features.num_prefix``) instead of
            dropping them after pooling.
        cut: leave out so many tokens at the start, whatever they are, and give all others off the grid, as LLaVA's
            ``vision_feature_select_strategy`` counts them; None: class tokens are told from grid tokens.
    """

    modality = "vision"
    POOLINGS = ("auto", "pooler", "cls", "mean")
    OLD_POOLING = "auto"
    WITHOUT_POOLER = "cls"

    def __init__(
        self,
        config: dict[str, Any],
        image_size: int | None = None,
        keep_prefix: bool = False,
        cut: int | None = None,
        **settings: Any,
    ):
        super().__init__(config, **settings)
        self.image_size, self.keep_prefix, self.cut = image_size, keep_prefix, cut
        self._asked = frozenset(inspect.signature(self.model.forward).parameters)
        self._measured: dict[tuple[int, int], tuple[tuple[int, int, int], int, int]] = {}
        self._counted: int | None = None

    @property
    def hidden_size(self) -> int:  # type: ignore[override]
        if hasattr(self.config, "hidden_size") or hasattr(self.config, "hidden_sizes"):
            return super().hidden_size
        return self._measure()[1]

    @property
    def pooled_size(self) -> int:
        plain = hasattr(self.config, "hidden_size") or self.pooling not in ("auto", "pooler")
        return self.hidden_size if plain else self._measure()[2]

    @property
    def naflex(self) -> bool:
        """Whether pictures of any shape come as padded rows of patches (SigLIP 2 NaFlex)."""
        return "spatial_shapes" in self._asked

    def forward(
        self,
        pixel_values: Tensor,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        layers: Sequence[int] = (),
        **_: Any,
    ) -> Features:
        """pixel_values [B, 3, H, W] (or NaFlex patches [B, N, P] with their mask and shapes) -> tokens [B, N, D]."""
        inputs: dict[str, Any] = {"pixel_values": pixel_values.to(next(self.model.parameters()).dtype)}
        if self.naflex:
            assert pixel_attention_mask is not None
            inputs |= {"pixel_attention_mask": pixel_attention_mask, "spatial_shapes": spatial_shapes}
            return self._padded(*self.run(inputs, layers), pixel_attention_mask.bool())
        if "interpolate_pos_encoding" in self._asked and self._own_size() not in (None, pixel_values.shape[-2:]):
            inputs["interpolate_pos_encoding"] = True
        tokens, out, states = self.run(inputs, layers)
        timm = getattr(self.model, "timm_model", None)
        if self.layer == -1 and getattr(timm, "output_fmt", "NCHW") == "NHWC":  # timm's Swin; its hidden states do not
            tokens = tokens.permute(0, 3, 1, 2)
        tokens, grid = self._on_grid(tokens, *pixel_values.shape[-2:])
        prefix = tokens.shape[1] - grid[1] * grid[2]
        own = getattr(out, "pooler_output", None) if self.pooling == "auto" else None
        if own is not None or self.pooling == "pooler":
            pooled = self.pooler_output(out).flatten(1)
        elif prefix and self.pooling in ("auto", "cls"):
            pooled = tokens[:, 0]
        else:
            pooled = tokens[:, prefix:].mean(1)
        cut = self.cut if self.cut is not None else 0 if self.keep_prefix else prefix
        tokens = tokens[:, cut:]
        if states is not None:
            # Stages of a CNN or Swin have grids of their own; those of a transformer are cut as the tokens are.
            flat = {k: self._on_grid(v, *pixel_values.shape[-2:])[0] for k, v in states.items()}
            states = {k: v[:, cut:] if v.shape[1] == cut + tokens.shape[1] else v for k, v in flat.items()}
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        if self.cut is not None:
            return Features(tokens, mask, pooled, layers=states)
        return Features(tokens, mask, pooled, grid, prefix - cut, states)

    def _padded(self, tokens: Tensor, out: Any, states: dict[int, Tensor] | None, mask: Tensor) -> Features:
        pooled = getattr(out, "pooler_output", None) if self.pooling in ("auto", "pooler") else None
        return Features(tokens, mask, masked_mean(tokens, mask) if pooled is None else pooled, layers=states)

    def _on_grid(self, tokens: Tensor, height: int, width: int) -> tuple[Tensor, tuple[int, int, int]]:
        """Tokens as [B, N, D] and the grid of the last of them, for pictures of height x width pixels."""
        if tokens.ndim == 4:  # a CNN's [B, D, h, w]
            return tokens.flatten(2).transpose(1, 2), (1, tokens.shape[2], tokens.shape[3])
        down, across = self._patch()
        # Hierarchical transformers halve the grid of their patches stage by stage.
        while (height // down) * (width // across) > tokens.shape[1]:
            down, across = 2 * down, 2 * across
        return tokens, (1, height // down, width // across)

    def _patch(self) -> tuple[int, int]:
        patch = getattr(self.config, "patch_size", None)
        if patch is None:
            patch = getattr(getattr(getattr(self.model, "timm_model", None), "patch_embed", None), "patch_size", 1)
        return (patch, patch) if isinstance(patch, int) else (int(patch[0]), int(patch[1]))

    def _own_size(self) -> tuple[int, int] | None:
        size = getattr(self.config, "image_size", None)
        return (size, size) if isinstance(size, int) else tuple(size) if size else None  # type: ignore[return-value]

    @property
    def grid(self) -> tuple[int, int, int] | None:
        """(1, rows, columns) of a picture of ``image_size``; None where every picture has its own, or with ``cut``."""
        if self.naflex or self.cut is not None:
            return None
        if getattr(self.config, "patch_size", None) and not hasattr(self.config, "depths"):
            (height, width), (down, across) = self._size(), self._patch()
            return (1, height // down, width // across)
        return self._measure()[0]

    def _size(self) -> tuple[int, int]:
        """Height and width of what the preprocessor makes."""
        if self.image_size:
            return (self.image_size, self.image_size)
        own = self._own_size()
        if own is not None:
            return own
        made = self.preprocessor()
        if hasattr(made, "image_size"):
            return (made.image_size, made.image_size)
        wanted = dict(getattr(made, "crop_size", None) or made.size)
        return tuple(wanted.get(k) or wanted["shortest_edge"] for k in ("height", "width"))  # type: ignore[return-value]

    def _measure(self) -> tuple[tuple[int, int, int], int, int]:
        """Grid, width of tokens and of ``pooled``, by running once: CNNs have no common config for them."""
        size = self._size()
        if size not in self._measured:
            out = self._blank(size)
            assert out.grid is not None
            self._measured[size] = (out.grid, out.tokens.shape[-1], out.pooled.shape[-1])
        return self._measured[size]

    def _blank(self, size: tuple[int, int]) -> Features:
        """What an empty picture gives."""
        first, was = next(self.model.parameters()), self.training
        with torch.no_grad():
            out = self.eval()(torch.zeros(1, 3, *size, dtype=first.dtype, device=first.device))
        self.train(was)
        return out

    def num_tokens(self, length: Any = None) -> int:
        if self.cut is not None:
            if self._counted is None:
                self._counted = self._blank(self._size()).tokens.shape[1]
            return self._counted
        grid = self.grid
        if grid is None:
            if length is None:
                raise UserError("a NaFlex tower gives a number of tokens that depends on the picture's shape")
            return int(length)
        return grid[1] * grid[2]

    def to_config(self) -> dict[str, Any]:
        config = {**super().to_config(), "image_size": self.image_size, "keep_prefix": self.keep_prefix}
        return config if self.cut is None else {**config, "cut": self.cut}

    def preprocessor(self) -> Any:
        made = copy.copy(super().preprocessor())  # its size may be changed by whoever asked for it
        if self.image_size:
            set_image_size(made, self.image_size)
        return made

    def load_preprocessor(self, source: str) -> Any:
        if self.config.model_type == "timm_wrapper":
            return timm_processor(self.config)
        return load_preprocessor(source, "vision")
