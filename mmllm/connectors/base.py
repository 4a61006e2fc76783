"""What all built-in connectors share: a config that rebuilds them, and saving to a folder."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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


class GridPositions(nn.Module):
    """A learned vector of a token's row plus one of its column; another grid gets them interpolated.

    They start at random, half as large as the normalised tokens that they are added to. From zero they grow so slowly
    that queries learn the boxes of the training scenes by heart before they learn places.

    Raises:
        UserError: no rows and columns.
    """

    def __init__(self, width: int, grid: tuple[int, int] | list[int] | None, kind: str):
        super().__init__()
        if grid is None or len(grid) != 2:
            do = "give grid: [6, 6], or take a tower whose tokens lie on a grid"
            raise UserError("positions need the grid's rows and columns", f"connector '{kind}'", do)
        self.rows = nn.Parameter(torch.randn(grid[0], width) * 0.5)
        self.columns = nn.Parameter(torch.randn(grid[1], width) * 0.5)

    def forward(self, tokens: Tensor, grid: tuple[int, int, int] | None, num_prefix: int = 0) -> Tensor:
        """tokens [B, N, width], class tokens first, then those on the grid -> the same with their places.

        Raises:
            UserError: they lie on no grid.
        """
        if grid is None:
            raise UserError("positions, but tokens on no grid", do="leave positions out")
        t, h, w = grid
        places = place_vectors(self.rows, self.columns, h, w).repeat(t, 1)
        return tokens + F.pad(places, (0, 0, num_prefix, 0)).to(tokens.dtype)


def place_vectors(rows: Tensor, columns: Tensor, h: int, w: int) -> Tensor:
    """[R, D] and [C, D], each interpolated to h and w -> [h * w, D], row by row."""
    rows, columns = (
        p if len(p) == n
        else F.interpolate(p.T[None], size=n, mode="linear", align_corners=False)[0].T
        for p, n in ((rows, h), (columns, w))
    )  # fmt: skip
    return (rows[:, None] + columns[None]).flatten(0, 1)


def keep_mask(tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Zeroes tokens [B, M, D] that the mask [B, M] excludes, so that padding never carries numbers."""
    if mask.device.type == "cpu" and bool(mask.all()):  # elsewhere asking would make the host wait
        return tokens, mask.to(torch.bool)
    return tokens * mask[..., None].to(tokens.dtype), mask.to(torch.bool)
