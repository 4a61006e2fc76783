"""LoRA layers that read the same input (q, k, v; gate, up) share what they do with it: x A^T, the gradients of A and x.

On a CPU the time of low-rank products goes to passes over [tokens, features], so each pass saved counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

# Names of layers that models of the Llama kind call with the same input.
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class _LoraLinears(torch.autograd.Function):
    """y_k = x W_k^T + scale_k (x A_k^T) B_k^T + bias_k, with W frozen; low-rank parts are added in place, without
    copies of y or of the gradient of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layers: Layers, *params: Tensor) -> tuple[Tensor, ...]:
        """x [..., in], params each layer's A [r, in], then each layer's B [out, r] -> each layer's [..., out]; A and B
        are cast to x's dtype."""
        n = len(layers.weights)
        rows = x.reshape(-1, x.shape[-1])
        a = (params[0] if n == 1 else torch.cat(params[:n])).to(x.dtype)
        bs = [b.to(x.dtype) for b in params[n:]]
        hidden = rows @ a.T
        hiddens = hidden.split([len(p) for p in params[:n]], 1)
        outputs = []
        for weight, bias, b, h, scale in zip(layers.weights, layers.biases, bs, hiddens, layers.scales, strict=True):
            outputs.append(nn.functional.linear(rows, weight, bias).addmm_(h, b.T, alpha=scale))
        ctx.save_for_backward(rows, a, hidden, *bs)
        ctx.layers, ctx.shape, ctx.dtype = layers, x.shape, params[0].dtype
        return tuple(y.view(*x.shape[:-1], -1) for y in outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, a, hidden, *bs = ctx.saved_tensors
        layers, ranks = ctx.layers, [b.shape[1] for b in bs]
        flat = [g.reshape(-1, g.shape[-1]) for g in grads]
        parts = [(g @ b).mul_(scale) for g, b, scale in zip(flat, bs, layers.scales, strict=True)]
        grad_hidden = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = flat[0] @ layers.weights[0]
            for g, weight in zip(flat[1:], layers.weights[1:], strict=True):
                grad_x.addmm_(g, weight)
            grad_x = grad_x.addmm_(grad_hidden, a).view(ctx.shape)
        grads_a = (grad_hidden.T @ rows).to(ctx.dtype).split(ranks)
        grads_b = [
            (g.T @ h).mul_(scale).to(ctx.dtype)
            for g, h, scale in zip(flat, hidden.split(ranks, 1), layers.scales, strict=True)
        ]
        return grad_x, None, *grads_a, *grads_b


class Layers:
    """What is frozen of the layers that one call computes."""

    def __init__(self, members: Sequence[Any], names: Sequence[str]):
        self.weights: list[Tensor] = [m.base_layer.weight for m in members]
        self.biases: list[Tensor | None] = [m.base_layer.bias for m in members]
        self.scales = [float(m.scaling[n]) for m, n in zip(members, names, strict=True)]


class LoraGroup:
    """One or several plain LoRA layers of peft, with one adapter each, that are called with the same input.

    The first call with an input computes all outputs, and the other layers find theirs. Once a layer comes with another
    input (as in cross-attention), each computes by itself from then on.
    """

    def __init__(self, members: Sequence[Any], names: Sequence[str]):
        """``members``: ``peft.tuners.lora.Linear`` on plain linear layers; ``names``: of their adapters."""
        self.members, self.names = list(members), list(names)
        self.together = True
        self._input: Tensor | None = None
        self._ready: dict[int, Tensor] = {}

    def __call__(self, which: int, x: Tensor) -> Tensor:
        """The output of layer ``which``: x [..., in] -> [..., out]."""
        if which in self._ready:
            found = self._ready.pop(which)
            if x is self._input:
                self._input = x if self._ready else None
                return found
            self.together, self._ready, self._input = False, {}, None
        if any(hasattr(m.base_layer.weight, "ds_id") for m in self.members):
            self.together = False  # ZeRO-3 has the weights of the layer that is called, and no others
        if not self.together:
            return self._compute(x, [which])[0]
        outputs = self._compute(x, range(len(self.members)))
        self._ready = {k: y for k, y in enumerate(outputs) if k != which}
        self._input = x if self._ready else None
        return outputs[which]

    def _compute(self, x: Tensor, which: Sequence[int]) -> tuple[Tensor, ...]:
        members, names = [self.members[k] for k in which], [self.names[k] for k in which]
        low = [m.lora_A[n].weight for m, n in zip(members, names, strict=True)]
        low += [m.lora_B[n].weight for m, n in zip(members, names, strict=True)]
        return _LoraLinears.apply(x, Layers(members, names), *low)  # type: ignore[return-value]


def lora_groups(found: dict[Any, str], model: nn.Module) -> list[LoraGroup]:
    """Groups of the layers ``found`` (layer -> its adapter's name), siblings together; each layer in one."""
    groups, left = [], dict(found)
    for parent in model.modules():
        for names in SIBLINGS:
            members = [getattr(parent, n, None) for n in names]
            if all(m in left for m in members) and len({m.base_layer.in_features for m in members}) == 1:  # type: ignore[union-attr]
                groups.append(LoraGroup(members, [left.pop(m) for m in members]))
    return [*groups, *(LoraGroup([m], [n]) for m, n in left.items())]
