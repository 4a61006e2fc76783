"""Objective that writes each thing's box into its grid cells' tokens, in a fixed code that an LLM can read linearly."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmllm.align.objectives import box_targets, centre_cell
from mmllm.blocks.box_code import box_code
from mmllm.contracts import AlignBatch, Objective
from mmllm.errors import unknown
from mmllm.registry import register


def soft_bins(values: Tensor, bins: int) -> Tensor:
    """Coordinates in 0..1, any shape -> [..., bins]: weight shared linearly between the two nearest bin centres."""
    position = (values.clamp(0, 1) * bins - 0.5).clamp(0, bins - 1)
    centres = torch.arange(bins, device=values.device, dtype=values.dtype)
    return (1 - (position[..., None] - centres).abs()).clamp(min=0)


@register("objective", "region_box")
class RegionBox(Objective):
    """Classifies, for each grid cell that lies on a thing, in which bin each side of the thing's box is.

    The same alignment as for names, for positions: the bins' directions are fixed, so the connector must write the box
    into the token, where the LLM's attention carries it to the answer. Needs a connector with positions.

    Args:
        stream: whose ``token_embedding`` is aligned.
        dim: width of the word embeddings.
        bins: per coordinate; 10 is one per first decimal.
        scale: factor on the projections, which are taken relative to a word embedding's length.
        cells: ``all`` that lie on a thing carry its box, or the one of its ``centre``: the others are then about its
            name alone.

    Raises:
        UserError: other ``cells``.
    """

    def __init__(self, stream: str, dim: int, bins: int = 10, scale: float = 12.0, cells: str = "all"):
        super().__init__()
        if cells not in ("all", "centre"):
            raise unknown("choice", cells, ("all", "centre"), "cells")
        self.stream, self.bins, self.scale, self.cells = stream, bins, scale, cells
        self.needs = frozenset({f"{stream}.token_embedding", "vocabulary"})
        self.register_buffer("code", box_code(dim, bins))

    def logits(self, tokens: Tensor, words: Tensor) -> Tensor:
        """tokens [B, M, D], words [V, D] -> [B, M, 4, bins]."""
        centre = words.mean(0)
        length = (words - centre).norm(dim=-1).mean()
        return self.scale * torch.einsum("bmd,kcd->bmkc", (tokens - centre) / length, self.code.to(tokens))

    def decode(self, logits: Tensor) -> Tensor:
        """[..., 4, bins] -> boxes [..., 4]: the expected bin centre, in 0..1."""
        centres = (torch.arange(self.bins, device=logits.device, dtype=logits.dtype) + 0.5) / self.bins
        return (logits.softmax(-1) * centres).sum(-1)

    def forward(self, batch: AlignBatch) -> dict[str, Tensor]:
        stream = batch.streams[self.stream]
        tokens, grid = stream.token_embedding, stream.grid
        assert tokens is not None and grid is not None and batch.boxes is not None
        words = batch.extras["vocabulary"]["embedding"].to(tokens)
        owner, boxes = box_cells(batch, grid[1:], tokens.device, self.cells == "centre")
        on_thing = owner >= 0
        if not on_thing.any():
            return {"loss": tokens.sum() * 0.0}
        logits = self.logits(tokens, words)[on_thing]
        truth = boxes[owner[on_thing]]
        loss = -(soft_bins(truth, self.bins) * F.log_softmax(logits, -1)).sum(-1).mean()
        error = (self.decode(logits) - truth).abs().mean()
        return {"loss": loss, "box_error": error.detach()}


def box_cells(
    batch: AlignBatch, grid: tuple[int, ...], device: torch.device, centre: bool = False
) -> tuple[Tensor, Tensor]:
    """The box that each grid cell lies on: index [B, M] into boxes [N, 4], -1 for background.

    Args:
        centre: only the cell of each box's centre lies on it.
    """
    rows, boxes = [], []
    assert batch.boxes is not None
    for things in batch.boxes:
        named = [{"xyxy": t["xyxy"], "text": str(i)} for i, t in enumerate(things)]
        index = {str(i): i for i in range(len(things))}
        if centre:
            target = torch.full((grid[0] * grid[1],), len(things))
            for i, thing in enumerate(things):
                row, column = centre_cell(thing["xyxy"], grid)
                target[row * grid[1] + column] = i
        else:
            target = box_targets(named, grid, index)
        rows.append(torch.where(target < len(things), target + len(boxes), -1))
        boxes += [t["xyxy"] for t in things]
    return torch.stack(rows).to(device), torch.tensor(boxes or [[0.0] * 4], device=device)
