"""What all built-in connectors share: a config that rebuilds them, and saving to a folder."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmllm.contracts import Connector, Features
from mmllm.errors import UserError


class FolderConnector(Connector):
    """A connector that remembers its settings and can be written as config.json + model.safetensors.

    Subclasses call ``super().__init__(kind, in_dim, out_dim, **settings)`` first.
    """

    def __init__(self, kind: str, in_dim: int, out_dim: int, **settings: Any):
        super().__init__()
        for name, value in (("in_dim", in_dim), ("out_dim", out_dim)):
            if not isinstance(value, int) or value < 1:
                raise UserError(f"{name} must be a whole number above 0 (got {value!r})", f"connector '{kind}'")
        self.kind, self.in_dim, self.out_dim, self.settings = kind, in_dim, out_dim, settings

    def to_config(self) -> dict[str, Any]:
        return {"type": self.kind, "in_dim": self.in_dim, "out_dim": self.out_dim, **self.settings}

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes ``config.json`` and ``model.safetensors``."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.to_config(), indent=2) + "\n", encoding="utf-8")
        tensors = {k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}
        save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})

    def content(self, features: Features) -> tuple[Tensor, Tensor]:
        """Tokens [B, N, D] in this connector's dtype and mask [B, N], without class tokens when there is a grid.

        Raises:
            UserError: the tower's width is not ``in_dim``.
        """
        tokens, mask = features.tokens, features.mask
        if tokens.shape[-1] != self.in_dim:
            raise UserError(
                f"tower gives {tokens.shape[-1]} numbers a token, connector '{self.kind}' expects {self.in_dim}",
                do="set in_dim to the tower's hidden_size",
            )
        if features.grid is not None and features.num_prefix:
            tokens, mask = tokens[:, features.num_prefix :], mask[:, features.num_prefix :]
        dtype = next((p.dtype for p in self.parameters()), tokens.dtype)
        return tokens.to(dtype), mask

    @staticmethod
    def count(grid_or_length: Any) -> int:
        """Tokens of a grid (t, h, w) or of a plain length."""
        return math.prod(grid_or_length) if isinstance(grid_or_length, (tuple, list)) else int(grid_or_length)


def keep_mask(tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Zeroes tokens [B, M, D] that the mask [B, M] excludes, so that padding never carries numbers."""
    return tokens * mask[..., None].to(tokens.dtype), mask.to(torch.bool)
