"""Objective that writes each thing's box into its grid cells' tokens, in a fixed code that an LLM can read linearly."""

from __future__ import annotations

import torch
from torch import Tensor

from mmllm.align.matching import assigned_things
from mmllm.align.objectives import box_targets, centre_cell
from mmllm.blocks.box_code import box_axes, waves
from mmllm.contracts import AlignBatch, Objective
from mmllm.errors import UserError, unknown
from mmllm.registry import register

GRID = 129  # values that a code is compared with

@register("objective", "region_box")
class RegionBox(Objective):
    """Writes into each grid cell that lies on a thing the box of that thing, in the code of ``mmllm.blocks.box_code``.

    The same alignment as for names, for positions: the code is fixed, so the connector must write the box into the
    token, where the LLM's attention carries it to the answer. Needs a connector with positions. A token on no grid (a
    query) carries the box that it is assigned to (``mmllm.align.matching``).

    Args:
        stream: whose ``token_embedding`` is aligned.
        dim: width of the word embeddings.
        reach: length at which each coordinate is written, in lengths of a word embedding around their mean.
        cells: ``all`` that lie on a thing carry its box, or the one of its ``centre``: the others are then about its
            name alone.

    Raises:
        UserError: other ``cells``; word embeddings too narrow for the code.
    """

    axes: Tensor
    grid: Tensor

    def __init__(self, stream: str, dim: int, reach: float = 0.3, cells: str = "all"):
        super().__init__()
        if cells not in ("all", "centre"):
            raise unknown("choice", cells, ("all", "centre"), "cells")
        self.stream, self.reach, self.cells = stream, reach, cells
        self.needs = frozenset({f"{stream}.token_embedding", "vocabulary"})
        try:
            self.register_buffer("axes", box_axes(dim))
        except ValueError as e:
            raise UserError(f"boxes need {e}", "objective 'region_box'", "leave it out with so small an LLM") from None
        self.register_buffer("grid", torch.linspace(0, 1, GRID))

    def written(self, tokens: Tensor, words: Tensor) -> Tensor:
        """tokens [..., D], words [V, D] -> [..., 4, 6]: what they say of the four coordinates, in waves."""
        centre = words.mean(0)
        length = (words - centre).norm(dim=-1).mean()
        return torch.einsum("...d,kwd->...kw", (tokens - centre) / length, self.axes.to(tokens)) / self.reach

    def decode(self, written: Tensor) -> Tensor:
        """[..., 4, 6] -> boxes [..., 4] in 0..1: of a fine grid the value whose code is nearest in direction."""
        return self.grid[(written.float() @ waves(self.grid).T).argmax(-1)]

    def forward(self, batch: AlignBatch) -> dict[str, Tensor]:
        tokens = batch.streams[self.stream].token_embedding
        assert tokens is not None
        owner, boxes = token_boxes(batch, self.stream, self.cells == "centre")
        on_thing = owner >= 0
        if not on_thing.any():
            return {"loss": tokens.sum() * 0.0}
        words = batch.extras["vocabulary"]["embedding"].to(tokens)
        found, truth = self.written(tokens[on_thing], words).float(), boxes[owner[on_thing]]
        loss = (found - waves(truth)).pow(2).sum(-1).mean()
        return {"loss": loss, "box_error": (self.decode(found.detach()) - truth).abs().mean()}


def token_boxes(batch: AlignBatch, stream: str, centre: bool = False) -> tuple[Tensor, Tensor]:
    """The box that each token of a stream stands for: index [B, M] into boxes [N, 4], -1 for none.

    On a grid that of its cell (``box_cells``), else the one that it is assigned to (``mmllm.align.matching``).
    """
    held = batch.streams[stream]
    assert held.token_embedding is not None and batch.boxes is not None
    device = held.token_embedding.device
    if held.grid is not None:
        return box_cells(batch, held.grid[1:], device, centre)
    vocabulary = batch.extras["vocabulary"]
    words = vocabulary["embedding"].to(held.token_embedding)
    own = assigned_things(held.token_embedding, held.token_mask, words, vocabulary["index"], batch.boxes)
    counts = torch.tensor([len(things) for things in batch.boxes], device=device)
    first = (counts.cumsum(0) - counts)[:, None]
    boxes = [t["xyxy"] for things in batch.boxes for t in things]
    return torch.where(own >= 0, own + first, -1), torch.tensor(boxes or [[0.0] * 4], device=device)


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
