"""Gated cross-attention into the LLM (Flamingo, arXiv 2204.14198, section 2.3): it changes nothing at the start."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmllm.blocks.cross_attention import CrossAttention, feed_forward
from mmllm.contracts import InjectedMedia, Injector
from mmllm.errors import UserError
from mmllm.registry import register


class GatedCrossAttention(nn.Module):
    """x + tanh(gate) * attention(x, media), then x + tanh(gate_mlp) * mlp(x); both gates start at 0.

    A token that sees no medium stays exactly as it is (in the paper the second sum applies to it too).
    """

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm, self.norm_media = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = CrossAttention(dim, dim, heads)
        self.norm_mlp, self.mlp = nn.LayerNorm(dim), feed_forward(dim)
        self.gate, self.gate_mlp = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, media: InjectedMedia) -> Tensor:
        """x [B, L, H] of the LLM, in its dtype -> the same."""
        sees = media.allowed.any(-1, keepdim=True)
        memory = self.norm_media(media.tokens.to(self.gate.dtype))
        y = self.attention(self.norm(x.to(self.gate.dtype)), memory, media.allowed)
        x = x + (self.gate.tanh() * y * sees).to(x.dtype)
        y = self.mlp(self.norm_mlp(x.to(self.gate.dtype)))
        return x + (self.gate_mlp.tanh() * y * sees).to(x.dtype)


@register("injector", "gated_cross_attention")
class GatedInjector(Injector):
    """A ``GatedCrossAttention`` before every ``every``-th decoder layer.

    Args:
        dim: width of the LLM; layers: how many decoder layers it has.
        attend: a token sees the ``last`` medium before it (as in the paper) or ``all`` before it.
        in_place: also put the media's tokens into the text, as without an injector; else a medium is one placeholder
            token there, whose embedding is the LLM's.
    """

    def __init__(
        self, dim: int, layers: int, every: int = 4, num_heads: int = 8, attend: str = "last", in_place: bool = False
    ):
        super().__init__()
        where = "injector 'gated_cross_attention'"
        if not 1 <= every <= layers:
            raise UserError(f"every must lie between 1 and the LLM's {layers} layers (got {every})", where)
        if dim % num_heads:
            raise UserError(f"the LLM's width {dim} is not a multiple of num_heads {num_heads}", where)
        if attend not in ("last", "all"):
            raise UserError(f"attend must be last or all (got {attend!r})", where)
        self.attend, self.in_place = attend, in_place
        self.settings = {"dim": dim, "layers": layers, "every": every, "num_heads": num_heads}
        self.blocks = nn.ModuleDict(
            {str(i): GatedCrossAttention(dim, num_heads) for i in range(layers) if (i + 1) % every == 0}
        )

    def forward(self, index: int, hidden: Tensor, media: InjectedMedia) -> Tensor:
        name = str(index)
        return self.blocks[name](hidden, media) if name in self.blocks else hidden

    def to_config(self) -> dict[str, Any]:
        return {
            "type": "gated_cross_attention", **self.settings, "attend": self.attend, "in_place": self.in_place
        }  # fmt: skip
