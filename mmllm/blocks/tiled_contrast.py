"""Contrastive losses of large batches: exact, with memory that grows with the batch and not with its square.

``contrast`` is the one softmax loss (masks, soft targets, several positives, queues, temperatures, divergences) and
``tiled_sigmoid`` the sigmoid loss. ``mmllm.blocks.contrast`` has the plain forms for score matrices that are small or
there already. Both losses also run over several processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmllm.blocks.divergences import (
    BinaryCrossEntropy,
    CrossEntropy,
    Divergence,
    HardestHinge,
    Hinge,
    ReverseKL,
    Targets,
)
from mmllm.blocks.ranks import Ranks
from mmllm.blocks.tile_scores import DotScores, FnScores, ScoreFn
from mmllm.blocks.tiles import PairFn, Pairs, Sweep, TiledLoss, diagonal

DIVERGENCES = ("cross_entropy", "reverse_kl", "hinge", "hardest_hinge")


def contrast(
    rows: Any,
    cols: Any,
    *,
    scale: Tensor | float = 1.0,
    extra_cols: Any = None,
    score_fn: ScoreFn | None = None,
    score_args: Sequence[Tensor] = (),
    target_fn: PairFn = diagonal,
    allow_fn: PairFn | None = None,
    scale_fn: PairFn | None = None,
    log_weight_fn: PairFn | None = None,
    label_smoothing: float = 0.0,
    positive_in_denominator: bool = True,
    divergence: str = "cross_entropy",
    margin: Tensor | float = 0.2,
    floor: float = 1e-8,
    symmetric: bool = False,
    ranks: Ranks | None = None,
    tile: int | tuple[int, int] | None = None,
) -> Tensor:
    """Contrastive loss of each row against all columns, made tile by tile in forward and backward; [R] float32.

    Score of a pair: ``z_ij = scale * scale_fn_ij * <row_i, col_j>``. For cosines give unit vectors; for a temperature
    of each row multiply the rows by it. With q_i the targets of row i divided by their sum and smoothed, and p_i the
    softmax of ``z_ij + log_weight_ij`` over its denominator, the loss is, by ``divergence``:

    - ``cross_entropy``: ``log sum_j exp(z_ij + log_weight_ij) - sum_j q_ij z_ij``, InfoNCE with several positives or
      soft targets; KL(q || p) up to the entropy of q and constants of the weights.
    - ``reverse_kl``: KL(p || q + floor) (SDM, arXiv 2303.12501).
    - ``hinge``: ``sum_j max(0, margin_i + z_ij - sum_k q_ik z_ik)`` over columns without target; ``hardest_hinge``:
      the largest of these terms (VSE++, arXiv 1707.05612).

    A row without a target has loss and gradient 0. What the pair functions give counts as constant. They are called
    with two slices of row and column numbers, several times per pass, and return [r, c] or None: None means no target,
    all allowed, factor 1, log-weight 0. ``lambda i, j: matrix[i, j]`` serves where a whole matrix is at hand.

    Args:
        rows, cols: [R, D] and [C, D]; with ``score_fn`` also tuples of tensors with R (C) first. Half-precision
            vectors are multiplied as they are, everything else is float32. Under autocast vectors take its type, and
            ``score_fn`` runs under it.
        scale: number or scalar tensor, which may need a gradient.
        extra_cols: further columns after ``cols`` (a queue, the rows' own modality); columns C..C+Q-1.
        score_fn: ``score_fn(rows, cols, *score_args) -> [r, c]`` in place of the dot product. It must repeat exactly,
            since each tile is made again for the gradient, and everything that it needs gradients for must come
            through its arguments.
        score_args: tensors that ``score_fn`` gets whole.
        target_fn: targets of pairs, bool or >= 0; by default row i belongs to column i.
        allow_fn: bool, False takes a pair out of targets and denominator.
        scale_fn: factors on the scores (1 / temperature of each pair).
        log_weight_fn: finite log-weights of the terms of the denominator; not for hinges.
        label_smoothing: share of the target that is spread over all allowed columns; not for hinges.
        positive_in_denominator: False leaves pairs with a target out of it (DCL, arXiv 2110.06848); cross-entropy only.
        margin: for hinges, a number or [R].
        symmetric: the mean of this loss and that of each column against all rows, [R] with R = C. Both directions are
            read off the same tiles, so it costs little more than one. Not with ``extra_cols``.
        ranks: several processes with R rows each: rows and columns of all are numbered rank by rank, each process has
            the loss of its own rows (see ``mmllm.blocks.ranks`` for the gradients), each score is made in one process.
        tile: largest tile, or (rows, columns) of it; None: 1024 on a CPU, 4096 elsewhere, 128 with ``score_fn``.

    Raises:
        ValueError: options that do not go together, shapes that do not match.
    """
    ranks = ranks if ranks is not None and ranks.size > 1 else None
    here, own_cols = _length(rows), _length(cols)
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence {divergence!r}: one of {', '.join(DIVERGENCES)}")
    if "hinge" in divergence and (label_smoothing or log_weight_fn is not None):
        raise ValueError("a hinge takes neither label smoothing nor log-weights")
    if divergence != "cross_entropy" and not positive_in_denominator:
        raise ValueError("positive_in_denominator=False is for the cross-entropy")
    if symmetric and (extra_cols is not None or here != own_cols):
        raise ValueError("symmetric needs as many columns as rows and no extra ones; run each direction by itself")
    if target_fn is diagonal and (here > own_cols or (ranks is not None and here < own_cols)):
        raise ValueError(f"{here} rows for {own_cols} columns: say by target_fn which belong together")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing {label_smoothing} is not in 0..1")
    if ranks is not None:
        cols = _each(ranks.gather, cols)
    if extra_cols is not None:
        cols = _each(lambda *parts: torch.cat(parts), cols, extra_cols)

    def make(targets: Targets, margin: Tensor | float) -> Divergence:
        if divergence == "cross_entropy":
            return CrossEntropy(targets, positive_in_denominator)
        if divergence == "reverse_kl":
            return ReverseKL(targets, floor)
        return (Hinge if divergence == "hinge" else HardestHinge)(targets, margin)

    col_margin = margin
    if symmetric and ranks is not None and isinstance(margin, Tensor) and margin.dim():
        col_margin = ranks.gather(margin.detach())
    directions = partial(make, margin=margin), partial(make, margin=col_margin) if symmetric else None
    scores, tensors = _scores(rows, cols, scale, 0.0, score_fn, score_args)
    pairs = Pairs(target_fn, allow_fn, scale_fn, log_weight_fn)
    first, size = (0, 1) if ranks is None else (here * ranks.rank, ranks.size)
    shape = here, _length(cols)
    sweep = Sweep(
        scores, pairs, directions, shape, _tile(tile, scores), label_smoothing,
        offset=(first, 0), total=(here * size, shape[1]), over=ranks,
    )  # fmt: skip
    row_loss, col_loss = TiledLoss.apply(sweep, *tensors)  # pyright: ignore[reportGeneralTypeIssues]
    return 0.5 * (row_loss + col_loss[first : first + here]) if symmetric else row_loss


def tiled_sigmoid(
    rows: Any,
    cols: Any,
    *,
    scale: Tensor | float = 1.0,
    bias: Tensor | float = 0.0,
    score_fn: ScoreFn | None = None,
    score_args: Sequence[Tensor] = (),
    target_fn: PairFn = diagonal,
    allow_fn: PairFn | None = None,
    scale_fn: PairFn | None = None,
    ranks: Ranks | None = None,
    tile: int | tuple[int, int] | None = None,
) -> Tensor:
    """Logistic loss of every pair, summed over the columns (SigLIP, arXiv 2303.15343, equation 1); [R] float32.

    Score of a pair: ``scale * scale_fn_ij * <row_i, col_j> + bias``. See ``contrast`` for the arguments.

    Args:
        target_fn: bool, or soft labels 0..1.
        bias: number or scalar tensor, which may need a gradient.
        ranks: several processes: the columns travel around the ring of them and their gradients with them, so that no
            process holds more than two processes' columns at a time. Vectors only.
    """
    pairs = Pairs(target_fn, allow_fn, scale_fn)
    shape = _length(rows), _length(cols)
    if ranks is not None and ranks.size > 1:
        if score_fn is not None:
            raise ValueError("the sigmoid loss over several processes is for vectors; gather the others")
        scores, tensors = _scores(rows, cols, scale, bias)
        ring = _Ring(ranks, pairs, shape, _tile(tile, scores))
        return _RingLoss.apply(ring, *tensors)  # pyright: ignore[reportReturnType]
    scores, tensors = _scores(rows, cols, scale, bias, score_fn, score_args)
    sweep = Sweep(scores, pairs, (BinaryCrossEntropy, None), shape, _tile(tile, scores))
    return TiledLoss.apply(sweep, *tensors)[0]  # pyright: ignore[reportOptionalSubscript]


class _Ring:
    """Makes the sweep over the local rows and the columns that came from another process."""

    def __init__(self, ranks: Ranks, pairs: Pairs, shape: tuple[int, int], tile: tuple[int, int]):
        self.ranks, self.pairs, self.shape, self.tile = ranks, pairs, shape, tile

    def sweep(self, step: int, rows: Tensor, cols: Tensor, scale: Tensor, bias: Tensor) -> Sweep:
        """The sweep after ``step`` moves around the ring."""
        owner = (self.ranks.rank - step) % self.ranks.size
        offset = self.ranks.rank * self.shape[0], owner * self.shape[1]
        scores = DotScores(rows, cols, scale, bias)
        return Sweep(scores, self.pairs, (BinaryCrossEntropy, None), self.shape, self.tile, offset=offset)


class _RingLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ring: _Ring, rows: Tensor, cols: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        ctx.ring = ring
        ctx.save_for_backward(rows, cols, scale, bias)
        held, total = cols.detach(), []
        with torch.autocast(rows.device.type, enabled=False):
            for step in range(ring.ranks.size):
                held = ring.ranks.shift(held) if step else held
                total.append(ring.sweep(step, rows, held, scale, bias).read()[0])
        return torch.stack(total).sum(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ring, (rows, cols, scale, bias) = ctx.ring, ctx.saved_tensors
        held, found = cols.detach(), None
        with torch.autocast(rows.device.type, enabled=False):
            for step in range(ring.ranks.size):
                held = ring.ranks.shift(held) if step else held
                sweep = ring.sweep(step, rows, held, scale, bias)
                sweep.begin()
                sweep.scores.begin((True, True, True, True))
                sweep.push((grad, None))
                new = sweep.scores.gradients()
                if found is not None:
                    # What the columns have gathered so far comes along with them.
                    found[1] = ring.ranks.shift(found[1])
                found = list(new) if found is None else [a + b for a, b in zip(found, new)]
            assert found is not None
            found[1] = ring.ranks.shift(found[1])
        return None, *(g.to(t.dtype) for g, t in zip(found, (rows, cols, scale, bias)))


def _each(fn: Callable[..., Tensor], *things: Any) -> Any:
    """``fn`` on tensors, or on the members of tuples of tensors."""
    return fn(*things) if isinstance(things[0], Tensor) else tuple(fn(*parts) for parts in zip(*things))


def _length(x: Any) -> int:
    return len(x) if isinstance(x, Tensor) else len(x[0])


def _tile(tile: int | tuple[int, int] | None, scores: DotScores | FnScores) -> tuple[int, int]:
    if tile is None:
        on_cpu = scores.tensors[0].device.type == "cpu"
        tile = 128 if isinstance(scores, FnScores) else 1024 if on_cpu else 4096
    return (tile, tile) if isinstance(tile, int) else tile


def _scores(
    rows: Any,
    cols: Any,
    scale: Tensor | float,
    bias: Tensor | float,
    score_fn: ScoreFn | None = None,
    score_args: Sequence[Tensor] = (),
) -> tuple[DotScores | FnScores, tuple[Tensor, ...]]:
    """What makes the scores, and the tensors with their graph in the order of its ``tensors``."""
    first = rows if isinstance(rows, Tensor) else rows[0]
    device, dtype = first.device, torch.promote_types(first.dtype, torch.float32)
    scale, bias = (x if isinstance(x, Tensor) else torch.tensor(x, dtype=dtype) for x in (scale, bias))
    if scale.numel() != 1 or bias.numel() != 1:
        raise ValueError("scale and bias must be scalars; multiply the rows for a temperature of each row")
    scale, bias = scale.reshape(()).to(device), bias.reshape(()).to(device)
    if score_fn is not None:
        scores = FnScores(score_fn, _each(Tensor.detach, rows), _each(Tensor.detach, cols), scale, bias, score_args)
        parts = [(x,) if isinstance(x, Tensor) else tuple(x) for x in (rows, cols)]
        return scores, (*parts[0], *parts[1], scale, bias, *score_args)
    if not (isinstance(rows, Tensor) and isinstance(cols, Tensor)) or rows.dim() != 2 or cols.dim() != 2:
        raise ValueError("rows and columns must be [R, D] and [C, D]; other inputs need a score_fn")
    if torch.is_autocast_enabled(device.type):
        fast = torch.get_autocast_dtype(device.type)
        rows, cols = rows.to(fast), cols.to(fast)
    cols = cols.to(rows.dtype)
    return DotScores(rows.detach(), cols.detach(), scale.detach(), bias.detach()), (rows, cols, scale, bias)
