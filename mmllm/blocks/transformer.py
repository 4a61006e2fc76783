"""A pre-norm transformer encoder that every small tower shares, with masks and taps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

SHORT_ROW = 1024  # tokens


def attend(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention; q [B, H, N, D], k and v [B, H, M, D] -> [B, H, N, D].

    ``allowed`` is bool, or a bias that is added to the scores, broadcast to [B, H, N, M].

    Where gradients are wanted on a CPU, short rows go through plain matrix products: the backward of torch's fused
    kernel is slower there (second row of ``benchmarks/align_step.py``).
    """
    long = max(q.shape[2], k.shape[2]) > SHORT_ROW
    trains = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
    if q.device.type != "cpu" or long or not trains:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
    weights = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if allowed is not None:
        additive = allowed.is_floating_point()
        weights = weights + allowed if additive else weights.masked_fill(~allowed, -torch.inf)
    return weights.softmax(-1) @ v


class SelfAttention(nn.Module):
    """Multi-head attention; parameters are named and shaped as in ``nn.MultiheadAttention``."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        if width % heads:
            raise ValueError(f"hidden_size {width} is not a multiple of {heads} heads")
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, allowed: Tensor | None = None) -> Tensor:
        """x [B, N, D], allowed [B, 1, 1 or N, N] bool -> [B, N, D]."""
        batch, count, width = x.shape
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias).view(batch, count, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = attend(q, k, v, allowed)
        return self.out_proj(mixed.transpose(1, 2).reshape(batch, count, width))


class EncoderLayer(nn.Module):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``; loads the weights of ``nn.TransformerEncoderLayer``.

    torch's own layer reads its linear layers' weights past their ``forward`` in eval mode, so that an adapter put on
    them (LoRA) would count in training and be lost afterwards.
    """

    def __init__(self, width: int, heads: int, expansion: int = 4):
        super().__init__()
        self.self_attn = SelfAttention(width, heads)
        self.linear1, self.linear2 = nn.Linear(width, expansion * width), nn.Linear(expansion * width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor, allowed: Tensor | None = None) -> Tensor:
        x = x + self.self_attn(self.norm1(x), allowed)
        return x + self.linear2(F.gelu(self.linear1(self.norm2(x))))


class Encoder(nn.Module):
    """A stack of encoder layers."""

    def __init__(self, width: int, heads: int, layers: int):
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(width, heads) for _ in range(layers))
        self.checkpointing = False  # layers keep their input alone; the backward runs them again

    def forward(
        self, x: Tensor, mask: Tensor | None = None, taps: Sequence[int] = ()
    ) -> tuple[Tensor, dict[int, Tensor] | None]:
        """x [B, N, D] -> the last layer's output and the tapped ones (see ``tapped``).

        Args:
            mask: [B, N] bool, True on tokens that may be looked at; a row without any looks at all of them.
        """
        allowed = None
        if mask is not None and not bool(mask.all()):
            allowed = (mask | ~mask.any(-1, keepdim=True))[:, None, None]
        states = [x]
        for layer in self.layers:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, allowed, use_reentrant=False)  # type: ignore[assignment]
            else:
                x = layer(x, allowed)
            if taps:
                states.append(x)
        return x, tapped(states, taps)


def tapped(states: Sequence[Tensor], taps: Iterable[int]) -> dict[int, Tensor] | None:
    """Index -> state, for the asked indices (0 is the input of the first block, -1 the last output); None for no taps.

    Raises:
        ValueError: there is no such state.
    """
    taps = list(taps)
    for index in taps:
        if not -len(states) <= index < len(states):
            raise ValueError(
                f"layer {index} was asked for, but there are {len(states)} states (0 to {len(states) - 1})"
            )
    return {index: states[index] for index in taps} if taps else None
