"""Cut pictures in the LLM: the tokens of all views in one row, with a learned separator after each row of tiles."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmllm.errors import UserError


class TileRows(nn.Module):
    """Joins the views of each picture: thumbnail, then row after row of tiles, each row closed by ``separator``."""

    def __init__(self, dim: int):
        super().__init__()
        self.separator = nn.Parameter(torch.randn(dim) / dim**0.5)  # LLaVA-NeXT's image_newline starts so

    def forward(self, tokens: Tensor, mask: Tensor, grids: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [T, M, H] and mask [T, M] of all views -> [n, L, H] and [n, L] of the pictures.

        Args:
            grids: [n, 2] rows and columns of each picture; one of 1x1 has one view and no separator.

        Raises:
            UserError: another number of views than the grids have.
        """
        shapes = [(int(r), int(c)) for r, c in grids.tolist()]
        counts = [1 if r * c == 1 else 1 + r * c for r, c in shapes]
        if sum(counts) != len(tokens):
            what = f"{len(tokens)} views of pictures for {sum(counts)} places in their grids"
            raise UserError(what, do="make the inputs with the model's own processor")
        # In a batch without any cut picture the separator still gets a gradient, so that no process waits for it.
        line = self.separator.to(tokens.dtype)[None]
        tokens = tokens + line.sum() * 0
        yes = mask.new_ones(1)
        rows, masks, start = [], [], 0
        for (r, c), count in zip(shapes, counts):
            own, valid = tokens[start : start + count], mask[start : start + count]
            start += count
            parts, kept = [own[0]], [valid[0]]
            for row in range(r if count > 1 else 0):
                at = slice(1 + row * c, 1 + (row + 1) * c)
                parts += [own[at].flatten(0, 1), line]
                kept += [valid[at].flatten(), yes]
            rows.append(torch.cat(parts))
            masks.append(torch.cat(kept))
        pad = nn.utils.rnn.pad_sequence
        return pad(rows, batch_first=True), pad(masks, batch_first=True)
