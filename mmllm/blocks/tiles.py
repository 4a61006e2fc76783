"""Sweeps over the tiles of a score matrix that is never held whole: once for the losses, again for the gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmllm.blocks.divergences import Divergence, Reduction, Targets, Tile
from mmllm.blocks.slices import even_slices
from mmllm.blocks.tile_scores import DotScores, FnScores

PairFn = Callable[[slice, slice], "Tensor | None"]


def diagonal(i: slice, j: slice) -> Tensor | None:
    """Target of pairs that lie side by side: row number = column number."""
    if i.stop <= j.start or j.stop <= i.start:
        return None
    return torch.arange(i.start, i.stop)[:, None] == torch.arange(j.start, j.stop)


@dataclass
class Pairs:
    """What the caller says about pairs: functions of two slices that give [r, c], or None where nothing is said."""

    target_fn: PairFn = diagonal
    allow_fn: PairFn | None = None
    scale_fn: PairFn | None = None
    log_weight_fn: PairFn | None = None

    def ask(self, fn: PairFn | None, i: slice, j: slice, device: torch.device) -> Tensor | None:
        said = None if fn is None else fn(i, j)
        if said is None:
            return None
        if said.shape != (i.stop - i.start, j.stop - j.start):
            raise ValueError(f"a function of pairs gave {tuple(said.shape)} for rows {i} and columns {j}")
        return said.detach().to(device)

    def masks(self, i: slice, j: slice, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Targets of the type and device of ``like``, 0 where not allowed, and the mask of allowed pairs."""
        target, allow = self.ask(self.target_fn, i, j, like.device), self.ask(self.allow_fn, i, j, like.device)
        target, allow = None if target is None else target.to(like.dtype), None if allow is None else allow.bool()
        return target if target is None or allow is None else target * allow, allow


class Sweep:
    """One loss over the tiles of a score matrix, in one direction or both; each tile is made once per pass.

    Args:
        scores: what makes tiles.
        pairs: what the caller said about pairs.
        make: from an anchor's Targets to its Divergence, for the direction of the rows and that of the columns; None
            leaves a direction out.
        shape: rows and columns.
        tile: largest tile.
        smoothing: label smoothing.
        offset: number of the first row and of the first column, as ``pairs`` counts.
        total: rows and columns over all processes.
        over: joins the directions' reading over processes that hold other rows of the same columns.
    """

    def __init__(
        self,
        scores: DotScores | FnScores,
        pairs: Pairs,
        make: tuple[Callable[[Targets], Divergence] | None, Callable[[Targets], Divergence] | None],
        shape: tuple[int, int],
        tile: tuple[int, int],
        smoothing: float = 0.0,
        offset: tuple[int, int] = (0, 0),
        total: tuple[int, int] | None = None,
        over: Reduction | None = None,
    ):
        self.scores, self.pairs, self.make, self.shape, self.tile = scores, pairs, make, shape, tile
        self.smoothing, self.offset, self.total, self.over = smoothing, offset, total or shape, over

        first = scores.tensors[0]
        self.device = first.device
        # An empty tensor that tells the type of losses and targets.
        self.like = torch.empty(0, dtype=torch.promote_types(first.dtype, torch.float32), device=first.device)

    def tiles(self) -> Iterator[tuple[slice, slice]]:
        for i in even_slices(self.shape[0], self.tile[0]):
            for j in even_slices(self.shape[1], self.tile[1]):
                yield i, j

    def numbered(self, i: slice, j: slice) -> tuple[slice, slice]:
        """The slices as the caller's functions count."""
        a, b = self.offset
        return slice(i.start + a, i.stop + a), slice(j.start + b, j.stop + b)

    def targets(self) -> tuple[Targets, Targets]:
        """Sums of targets and numbers of allowed candidates of the rows and of the columns."""
        sums = [self.like.new_zeros(n) for n in (*self.shape, *self.shape)]
        if self.pairs.target_fn is diagonal and self.pairs.allow_fn is None:
            for k in (0, 1):
                number = torch.arange(self.shape[k], device=self.device) + self.offset[k]
                sums[k] += number < self.total[1 - k]
                sums[k + 2] += self.total[1 - k]
        else:
            for i, j in self.tiles():
                target, allow = self.pairs.masks(*self.numbered(i, j), self.like)
                for k, (at, other) in enumerate(((i, j), (j, i))):
                    if target is not None:
                        sums[k][at] += target.sum(1 - k)
                    sums[k + 2][at] += other.stop - other.start if allow is None else allow.sum(1 - k)
            if self.over is not None:
                self.over.sum(sums[1])
                self.over.sum(sums[3])
        row_mass, col_mass, row_count, col_count = sums
        return Targets(row_mass, row_count, self.smoothing), Targets(col_mass, col_count, self.smoothing)

    def begin(self) -> None:
        """Makes the directions anew."""
        self.directions = [None if m is None else m(t) for m, t in zip(self.make, self.targets())]

    def read(self) -> tuple[Tensor | None, Tensor | None]:
        """The losses of the rows and of the columns."""
        self.begin()
        rows, cols = self.directions
        for number, needs in enumerate(next(d for d in self.directions if d is not None).rounds):
            for i, j in self.tiles():
                tile, _ = self.tile_at(i, j, skip=needs == "targets")
                if tile is not None and rows is not None:
                    rows.read(number, i, tile)
                if tile is not None and cols is not None:
                    cols.read(number, j, tile.transposed(self.numbered(i, j)[0].start))
            if self.over is not None and cols is not None:
                cols.reduce(number, self.over)
        row_loss, col_loss = (None if d is None else d.losses() for d in self.directions)
        return row_loss, col_loss

    def tile_at(self, i: slice, j: slice, skip: bool = False) -> tuple[Tile | None, Tensor | None]:
        """The tile and the factor on its scores; None where ``skip`` is set and no pair has a target."""
        at = self.numbered(i, j)
        target, allow = self.pairs.masks(*at, self.like)
        if skip and target is None:
            return None, None
        factor = self.pairs.ask(self.pairs.scale_fn, *at, self.device)
        weight = self.pairs.ask(self.pairs.log_weight_fn, *at, self.device)
        return Tile(self.scores.tile(i, j, factor), target, allow, weight, at[1].start), factor

    def push(self, grads: tuple[Tensor | None, Tensor | None]) -> None:
        """Adds to the scores' gradients, given those of the two losses; after ``read`` and ``scores.begin``."""
        factors = [None if d is None or g is None else (g * d.valid)[:, None] for d, g in zip(self.directions, grads)]
        rows, cols = self.directions
        for i, j in self.tiles():
            tile, factor = self.tile_at(i, j)
            assert tile is not None
            slope = None
            if rows is not None and factors[0] is not None:
                slope = rows.slopes(i, tile).mul_(factors[0][i])
            if cols is not None and factors[1] is not None:
                other = cols.slopes(j, tile.transposed(self.numbered(i, j)[0].start)).mul_(factors[1][j]).T
                slope = other if slope is None else slope.add_(other)
            if slope is not None:
                self.scores.push(i, j, slope, factor)


class TiledLoss(torch.autograd.Function):
    """``apply(sweep, *sweep.scores.tensors) -> losses of the rows, losses of the columns`` (empty where left out)."""

    @staticmethod
    def forward(ctx: Any, sweep: Sweep, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(sweep.device.type, enabled=False):
            losses = sweep.read()
        ctx.save_for_backward(*tensors)
        ctx.sweep = sweep
        ctx.set_materialize_grads(False)
        return tuple(sweep.like.clone() if x is None else x for x in losses)  # pyright: ignore[reportReturnType]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, row_grad: Tensor | None, col_grad: Tensor | None) -> tuple[Tensor | None, ...]:
        sweep, tensors = ctx.sweep, ctx.saved_tensors
        needed = ctx.needs_input_grad[1:]
        if sweep.over is not None and col_grad is not None:
            col_grad = col_grad.clone()
            sweep.over.sum(col_grad)
        with torch.autocast(sweep.device.type, enabled=False):
            sweep.scores.begin(needed)
            sweep.push((row_grad, col_grad))
            found = sweep.scores.gradients()
        return None, *(g.to(t.dtype) if n and g is not None else None for g, t, n in zip(found, tensors, needed))
