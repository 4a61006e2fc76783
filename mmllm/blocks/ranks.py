"""Tensors across the processes of one training, with gradients: gather, pass on to the neighbour, average.

Every loss here follows the convention of DistributedDataParallel: each process has the mean loss of its own items, and
the gradients of the parameters are averaged over the processes. They are then those of one process with all items.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Ranks:
    """The processes of a group, and sums, maxima and a ring among them.

    Args:
        group: None is the default group. Without ``torch.distributed`` there is one process.
    """

    def __init__(self, group: dist.ProcessGroup | None = None):
        alone = not (dist.is_available() and dist.is_initialized())
        self.group = group
        self.size = 1 if alone else dist.get_world_size(group)
        self.rank = 0 if alone else dist.get_rank(group)

    def sum(self, x: Tensor) -> None:
        """Replaces x by its sum over the processes."""
        if self.size > 1:
            dist.all_reduce(x, dist.ReduceOp.SUM, group=self.group)

    def max(self, x: Tensor) -> None:
        """Replaces x by its maximum over the processes."""
        if self.size > 1:
            dist.all_reduce(x, dist.ReduceOp.MAX, group=self.group)

    def shift(self, x: Tensor) -> Tensor:
        """Gives x to the next process and returns the previous one's, which must have the same shape."""
        if self.size == 1:
            return x
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        after, before = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        moves = [
            dist.P2POp(dist.isend, x.contiguous(), group=self.group, group_peer=after),
            dist.P2POp(dist.irecv, out, group=self.group, group_peer=before),
        ]
        for work in dist.batch_isend_irecv(moves):
            work.wait()
        return out

    def gather(self, x: Tensor) -> Tensor:
        """[n, ...] of each process -> [size x n, ...], in the order of the ranks; the gradient comes back as a sum.

        All processes must call it, in the same order, with the same shape.
        """
        return _Gather.apply(self, x) if self.size > 1 else x

    def average_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Averages the parameters' gradients in place, for models that are not wrapped in DistributedDataParallel.

        A parameter that has no gradient here counts as zero, so all processes must give the same parameters.
        """
        if self.size == 1:
            return
        for p in parameters:
            if p.requires_grad:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                self.sum(p.grad)
                p.grad /= self.size


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ranks: Ranks, x: Tensor) -> Tensor:
        ctx.ranks, ctx.count = ranks, len(x)
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(ranks.size)]
        dist.all_gather(parts, x.contiguous(), group=ranks.group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        grad = grad.contiguous().clone()
        ctx.ranks.sum(grad)
        return None, grad[ctx.ranks.rank * ctx.count :][: ctx.count]
