"""Cross-entropy over a large vocabulary straight from hidden states, chunk by chunk: logits never exist all at once.

The gradient is made in the forward while a chunk's logits are there (as in Liger's kernels, arXiv 2410.10989, section
3.2), so nothing is computed twice and the backward only scales it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 2**23  # logits at a time; four times as many where the weight trains, whose gradient is added to in each chunk


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        share: Tensor,
        scale: float,
        softcap: float | None,
        rows: int,
    ) -> Tensor:
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        wants = ctx.needs_input_grad[:3]
        # Gradients of the sum; its division by the total waits for the backward, so that float16 does not underflow.
        grads = [
            torch.empty_like(hidden) if wants[0] else None,
            torch.zeros_like(weight, dtype=wide) if wants[1] and len(hidden) > rows else None,
            torch.zeros_like(bias, dtype=wide) if wants[2] and bias is not None else None,
        ]
        total = hidden.new_zeros((), dtype=wide)
        for at in range(0, len(hidden), rows):
            h, target, w = hidden[at : at + rows], targets[at : at + rows, None], share[at : at + rows, None].to(wide)
            z = torch.nn.functional.linear(h, weight, bias).to(wide)
            if scale != 1:
                z = z.mul_(scale)
            bent = None
            if softcap is not None:
                bent = torch.tanh(z / softcap)
                z = bent * softcap
            norm = z.logsumexp(-1, keepdim=True)
            total += ((norm - z.gather(1, target)) * w).sum()
            if not any(wants):
                continue
            z = z.sub_(norm).exp_()  # the softmax
            z.scatter_add_(1, target, torch.full_like(norm, -1))
            z = z.mul_(w * scale)
            if bent is not None:
                z = z.mul_(1 - bent.square_())
            low = z.to(weight.dtype)
            if grads[0] is not None:
                grads[0][at : at + rows] = low @ weight
            if grads[1] is not None:
                grads[1] += low.T @ h.to(low.dtype)
            elif wants[1]:  # a single chunk has nothing to be added to
                grads[1] = low.T @ h.to(low.dtype)
            if grads[2] is not None:
                grads[2] += z.sum(0)
        count = share.to(wide).sum()
        ctx.save_for_backward(count, *grads)
        ctx.dtypes = hidden.dtype, weight.dtype, bias.dtype if bias is not None else None
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> tuple[Any, ...]:
        count, *grads = ctx.saved_tensors
        factor = outer[0] / count
        found = [None if g is None else (g * factor.to(g.dtype)).to(dtype) for g, dtype in zip(grads, ctx.dtypes)]
        return (*found, None, None, None, None, None)


def lm_head_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    share: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Weighted mean cross-entropy of ``softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)``.

    Equal to plain cross-entropy in value and gradient; in low precision the softmax and its sums are in float32.

    Args:
        hidden: [n, H], the states at supervised positions.
        weight: [V, H]; bias: [V].
        targets: [n] int64 in 0..V-1.
        share: [n] weights of the mean; None: all alike.
        scale, softcap: what the LLM does to its logits after the head.
        chunk: positions at a time; None: so many that a chunk has 8 million logits (32 where the weight trains).

    Returns:
        A scalar, float32 (float64 for float64).

    Raises:
        ValueError: no positions.
    """
    if not len(hidden):
        raise ValueError("no supervised position")
    rows = chunk or max(1, CHUNK * (4 if weight.requires_grad else 1) // len(weight))
    share = hidden.new_ones(len(hidden), dtype=torch.float32) if share is None else share
    return _HeadLoss.apply(hidden, weight, bias, targets, share, scale, softcap, rows)  # type: ignore[return-value]
