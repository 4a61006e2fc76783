"""Scores of a tile of pairs, made when they are needed, and the gradients of what they are made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

ScoreFn = Callable[..., Tensor]


class DotScores:
    """scale x <row, column> + bias, with its gradients by hand: three matrix products and no graph.

    Args:
        rows, cols: [R, D], [C, D]; multiplied in their own dtype, summed up in at least float32.
        scale, bias: scalar tensors.
    """

    def __init__(self, rows: Tensor, cols: Tensor, scale: Tensor, bias: Tensor):
        self.rows, self.cols, self.scale, self.bias = rows, cols, scale, bias
        self.dtype = torch.promote_types(rows.dtype, torch.float32)
        self.buffer = rows.new_empty(0)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.rows, self.cols, self.scale, self.bias

    def tile(self, i: slice, j: slice, factor: Tensor | None) -> Tensor:
        """Scores [r, c] of a tile; they stay valid until the next call."""
        x, y = self.rows[i], self.cols[j]
        if self.buffer.shape != (len(x), len(y)):
            self.buffer = x.new_empty(len(x), len(y))
        z = torch.mm(x, y.T, out=self.buffer).to(self.dtype).mul_(self.scale)
        return (z if factor is None else z.mul_(factor)).add_(self.bias)

    def begin(self, needed: Sequence[bool]) -> None:
        """Before the sweep of gradients; ``needed`` says for which of ``tensors``."""
        rows, cols, scale, _ = needed
        self.row_grad = torch.zeros_like(self.rows, dtype=self.dtype) if rows or scale else None
        self.col_grad = torch.zeros_like(self.cols, dtype=self.dtype) if cols else None
        self.bias_grad = torch.zeros((), dtype=self.dtype, device=self.rows.device)

    def push(self, i: slice, j: slice, slope: Tensor, factor: Tensor | None) -> None:
        """Takes d loss / d score [r, c] of the tile that was made last."""
        self.bias_grad += slope.sum()
        slope = (slope if factor is None else slope * factor).to(self.rows.dtype)
        for grad, at, a, b in ((self.row_grad, i, slope, self.cols[j]), (self.col_grad, j, slope.T, self.rows[i])):
            if grad is None:
                continue
            if grad.dtype == a.dtype:
                grad[at].addmm_(a, b)
            else:
                grad[at] += a @ b

    def gradients(self) -> tuple[Tensor | None, ...]:
        """Hands over the gradients of ``tensors``."""
        (rows, cols), scale = (self.row_grad, self.col_grad), None
        self.row_grad = self.col_grad = None
        if rows is not None:
            scale = torch.einsum("nd,nd->n", rows, self.rows.to(self.dtype)).sum()
            rows.mul_(self.scale)
        if cols is not None:
            cols.mul_(self.scale)
        return rows, cols, scale, self.bias_grad


class FnScores:
    """scale x score_fn(rows, columns, *args) + bias, with its gradients by running each tile again under autograd.

    Args:
        rows, cols: tensors or tuples of tensors with a first axis in common, of which tiles take slices.
        scale, bias: scalar tensors.
        args: tensors that ``score_fn`` gets whole.
    """

    def __init__(self, score_fn: ScoreFn, rows: Any, cols: Any, scale: Tensor, bias: Tensor, args: Sequence[Tensor]):
        self.score_fn = score_fn
        self.bare = isinstance(rows, Tensor), isinstance(cols, Tensor)
        self.rows = (rows,) if isinstance(rows, Tensor) else tuple(rows)
        self.cols = (cols,) if isinstance(cols, Tensor) else tuple(cols)
        self.whole = (scale, bias, *args)
        self.needed: Sequence[bool] = ()
        kind = self.rows[0].device.type
        self.autocast = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return *self.rows, *self.cols, *self.whole

    def tile(self, i: slice, j: slice, factor: Tensor | None) -> Tensor:
        """Scores [r, c] of a tile, with their graph where gradients are wanted."""
        parts = [*(x[i] for x in self.rows), *(y[j] for y in self.cols), *self.whole]
        need = self.needed or [False] * len(parts)
        self.leaves = [t.detach().requires_grad_(n) for t, n in zip(parts, need)]
        r, c = len(self.rows), len(self.cols)
        x, y, (scale, bias, *args) = self.leaves[:r], self.leaves[r : r + c], self.leaves[r + c :]
        with torch.set_grad_enabled(any(need)):
            with torch.autocast(*self.autocast):
                z = self.score_fn(x[0] if self.bare[0] else tuple(x), y[0] if self.bare[1] else tuple(y), *args)
            if z.shape != (i.stop - i.start, j.stop - j.start):
                raise ValueError(f"score_fn gave {tuple(z.shape)} for rows {i} and columns {j}")
            z = z.to(torch.promote_types(z.dtype, torch.float32)) * scale
            self.scores = (z if factor is None else z * factor) + bias
        return self.scores.detach()

    def begin(self, needed: Sequence[bool]) -> None:
        self.needed = needed
        self.grads = [
            torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32)) if n else None
            for t, n in zip(self.tensors, needed)
        ]

    def push(self, i: slice, j: slice, slope: Tensor, factor: Tensor | None) -> None:
        wanted = [k for k, n in enumerate(self.needed) if n]
        found = torch.autograd.grad(
            self.scores, [self.leaves[k] for k in wanted], slope.to(self.scores.dtype), allow_unused=True
        )
        at = [i] * len(self.rows) + [j] * len(self.cols) + [...] * len(self.whole)
        for k, g in zip(wanted, found):
            grad = self.grads[k]
            if g is not None and grad is not None:
                grad[at[k]] += g

    def gradients(self) -> tuple[Tensor | None, ...]:
        found, self.grads, self.leaves, self.needed = self.grads, [], [], ()
        del self.scores
        return tuple(found)
