"""Attention within the documents of a packed row, one after the other: no mask over the whole row is ever made."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from mmllm.blocks.plain_attention import plain_attention
from mmllm.blocks.transformer import SHORT_ROW


@dataclass
class Documents:
    """Where the documents of a packed row lie.

    Attributes:
        bounds: (begin, end) of each.
        branches: [T] int, for rows whose documents have branches: 0 in a document's prefix, k in its branch k, which
            sees the prefix and itself.
    """

    bounds: list[tuple[int, int]]
    branches: Tensor | None = None
    _masks: dict[tuple[int, int | None], Tensor] = field(default_factory=dict, repr=False)
    _biases: dict[tuple[int, int | None, torch.dtype], Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, ids: Tensor, branches: Tensor | None = None) -> Documents:
        """From numbers [T] that change where a document ends."""
        cuts = (ids[1:] != ids[:-1]).nonzero().flatten() + 1
        edges = [0, *cuts.tolist(), len(ids)]
        return cls(list(zip(edges[:-1], edges[1:])), branches)

    def positions(self, device: torch.device) -> Tensor:
        """[T]: places counted anew in each document."""
        return torch.cat([torch.arange(end - begin, device=device) for begin, end in self.bounds])

    def mask(self, index: int, window: int | None, device: torch.device) -> Tensor:
        """[l, l] bool of one document; made once for all layers (documents of a length share theirs)."""
        begin, end = self.bounds[index]
        length = end - begin
        key = (-length, window) if self.branches is None else (index, window)
        if key not in self._masks:
            at = torch.arange(length, device=device)
            seen = at[:, None] >= at
            if window is not None:
                seen &= at[:, None] - at < window
            if self.branches is not None:
                own = self.branches[begin:end]
                seen &= (own[:, None] == own) | (own == 0)
            self._masks[key] = seen
        return self._masks[key]

    def bias(self, index: int, window: int | None, like: Tensor) -> Tensor:
        """``mask`` to be added to scores, [1, 1, l, l] with the type and place of ``like``; made once, too."""
        seen = self.mask(index, window, like.device)
        key = (index, window, like.dtype)
        if key not in self._biases:
            low = torch.finfo(like.dtype).min
            self._biases[key] = torch.zeros_like(seen, dtype=like.dtype).masked_fill_(~seen, low)[None, None]
        return self._biases[key]


def document_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Documents,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Causal attention of each document to itself; q [1, H, T, D], k and v [1, H / g, T, D] -> [1, H, T, D].

    Short documents that train on a CPU go through plain matrix products, whose backward is faster there than that of
    torch's fused kernel (``benchmarks/tune_speed.py``); others through SDPA.

    Args:
        window: a token sees so many tokens, itself included; None: all before it.
        softcap: c of c * tanh(logits / c).
    """
    groups = q.shape[1] // k.shape[1]
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    trains = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
    out = []
    plain = trains and q.device.type == "cpu" and softcap is None and not dropout and k.dtype == v.dtype == q.dtype
    for index, (begin, end) in enumerate(documents.bounds):
        q_, k_, v_ = (x[:, :, begin:end] for x in (q, k, v))
        if plain and end - begin <= SHORT_ROW:
            out.append(plain_attention(q_, k_, v_, documents.bias(index, window, q), factor))
            continue
        if groups > 1:
            k_, v_ = k_.repeat_interleave(groups, 1), v_.repeat_interleave(groups, 1)
        bare = documents.branches is None and (window is None or window >= end - begin)
        if softcap is not None or (dropout and trains and q.device.type == "cpu" and end - begin <= SHORT_ROW):
            weights = (q_ * factor) @ k_.transpose(-1, -2)
            if softcap is not None:
                weights = torch.tanh(weights / softcap) * softcap
            weights = weights.masked_fill(~documents.mask(index, None if bare else window, q.device), -torch.inf)
            weights = F.dropout(weights.softmax(-1, dtype=torch.float32).to(q.dtype), dropout)
            out.append(weights @ v_)
        else:
            mask = None if bare else documents.mask(index, window, q.device)
            out.append(
                F.scaled_dot_product_attention(
                    q_, k_, v_, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=factor
                )
            )
    return torch.cat(out, 2)
