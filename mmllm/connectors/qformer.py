"""The query transformer: K learned queries read the tower's tokens by cross-attention (BLIP-2, arXiv 2301.12597).

With a text (InstructBLIP, arXiv 2305.06500) the queries also see the question, and so choose what to bring along.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from mmllm.blocks.cross_attention import CrossAttention, feed_forward
from mmllm.connectors.base import FolderConnector
from mmllm.contracts import Features
from mmllm.errors import UserError
from mmllm.registry import register


class _Block(nn.Module):
    """Self-attention among the queries, cross-attention to the tower where asked, feed-forward; all pre-norm.

    Text tokens share the self-attention with the queries and have a feed-forward of their own; they never look at the
    tower. The last block only lets the queries look at them.
    """

    def __init__(self, dim: int, memory_dim: int, heads: int, cross: bool, dropout: float, text: bool, last: bool):
        super().__init__()
        self.norm_self, self.self_attention = nn.LayerNorm(dim), CrossAttention(dim, dim, heads)
        self.norm_cross = nn.LayerNorm(dim) if cross else None
        self.cross_attention = CrossAttention(dim, memory_dim, heads) if cross else None
        self.norm_mlp = nn.LayerNorm(dim)
        self.mlp = feed_forward(dim, dropout)
        grows = text and not last
        self.norm_text = nn.LayerNorm(dim) if grows else None
        self.mlp_text = feed_forward(dim, dropout) if grows else None

    def forward(
        self, x: Tensor, memory: Tensor, allowed: Tensor, text: Tensor | None = None, text_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Queries x [B, K, D], memory [B, N, M], text [B, L, D] with mask [B, L] -> queries, text."""
        y = self.norm_self(x)
        if text is None or text_mask is None:
            x = x + self.self_attention(y, y)
        else:
            both = torch.cat([y, self.norm_self(text)], 1)
            seen = torch.cat([text_mask.new_ones(x.shape[:2]), text_mask], 1)
            if self.mlp_text is None or self.norm_text is None:
                x, text = x + self.self_attention(y, both, seen), None
            else:
                mixed = self.self_attention(both, both, seen)
                x, text = x + mixed[:, : x.shape[1]], text + mixed[:, x.shape[1] :]
                text = text + self.mlp_text(self.norm_text(text))
        if self.cross_attention is not None and self.norm_cross is not None:
            x = x + self.cross_attention(self.norm_cross(x), memory, allowed)
        return x + self.mlp(self.norm_mlp(x)), text


@register("connector", "qformer")
class QFormerConnector(FolderConnector):
    """``num_queries`` learned queries pass through ``num_layers`` blocks with cross-attention every ``cross_every``.

    Always gives ``num_queries`` tokens, whatever the input's length; padding and order of the padding don't matter.

    Args:
        text_dim: width of a text that the queries see too (in a multimodal LLM the width of its word embeddings, which
            ``text_dim: auto`` stands for there); None: they see none.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        num_queries: int = 16,
        num_layers: int = 2,
        hidden_dim: int = 256,
        num_heads: int = 4,
        cross_every: int = 1,
        dropout: float = 0.0,
        text_dim: int | str | None = None,
    ):
        if hidden_dim % num_heads:
            raise UserError(
                f"hidden_dim {hidden_dim} is not a multiple of num_heads {num_heads}", "connector 'qformer'"
            )
        if min(num_queries, num_layers, cross_every) < 1:
            raise UserError("num_queries, num_layers and cross_every must be at least 1", "connector 'qformer'")
        text_dim = out_dim if text_dim == "auto" else text_dim
        if text_dim is not None and (not isinstance(text_dim, int) or text_dim < 1):
            raise UserError(f"text_dim must be auto or above 0 (got {text_dim!r})", "connector 'qformer'")
        super().__init__(
            "qformer",
            in_dim,
            out_dim,
            num_queries=num_queries,
            num_layers=num_layers,
            hidden_dim=hidden_dim,
            num_heads=num_heads,
            cross_every=cross_every,
            dropout=dropout,
            **({} if text_dim is None else {"text_dim": text_dim}),
        )
        self.num_queries = num_queries
        self.queries = nn.Parameter(torch.randn(num_queries, hidden_dim) * 0.02)
        self.norm_in = nn.LayerNorm(in_dim)
        self.blocks = nn.ModuleList(
            _Block(
                hidden_dim, in_dim, num_heads, i % cross_every == 0, dropout, text_dim is not None, i == num_layers - 1
            )
            for i in range(num_layers)
        )
        self.norm_out = nn.LayerNorm(hidden_dim)
        self.out = nn.Linear(hidden_dim, out_dim)
        self.text_in = nn.Linear(text_dim, hidden_dim) if text_dim is not None else None

    @property
    def takes_text(self) -> bool:
        return self.text_in is not None

    def forward(self, features: Features, text: Features | None = None) -> tuple[Tensor, Tensor]:
        """Tower features of B inputs -> tokens [B, num_queries, out_dim] and mask.

        Args:
            text: one row of text tokens [B, L, text_dim] for each input, with their mask; left out, or masked all over,
                where there is no text.

        Raises:
            UserError: a text for a connector without ``text_dim``, or one of another width.
        """
        # Class tokens stay: queries can use them, and they cost no output token.
        tokens, mask = self.content(Features(features.tokens, features.mask, features.pooled))
        x = self.queries.expand(len(tokens), -1, -1)
        memory = self.norm_in(tokens)
        words, words_mask = (None, None) if text is None else self._words(text)
        for block in self.blocks:
            x, words = block(x, memory, mask, words, words_mask)
        return self.out(self.norm_out(x)), mask.any(1, keepdim=True).expand(-1, self.num_queries)

    def _words(self, text: Features) -> tuple[Tensor, Tensor]:
        """The text's tokens [B, L, hidden_dim] with sinusoids of their places, and its mask."""
        if self.text_in is None:
            raise UserError("this query transformer takes no text", "connector 'qformer'", "set text_dim")
        if text.tokens.shape[-1] != self.text_in.in_features:
            raise UserError(
                f"the text has {text.tokens.shape[-1]} numbers a token, text_dim is {self.text_in.in_features}",
                "connector 'qformer'",
            )
        words = self.text_in(text.tokens.to(self.text_in.weight.dtype))
        place = text.mask.cumsum(1) - 1  # counted over valid tokens, so padding on either side does not matter
        return words + sinusoids(place, words.shape[-1]).to(words.dtype), text.mask.bool()

    def num_tokens(self, grid_or_length: Any) -> int:
        return self.num_queries

    def out_grid(self, grid: tuple[int, int, int] | None) -> None:
        """None: a token belongs to no place."""


def sinusoids(place: Tensor, dim: int) -> Tensor:
    """Places [...] -> [..., dim]: sines, then cosines, of wavelengths from 2 pi to 10,000 times that."""
    half = (dim + 1) // 2
    rate = torch.exp(torch.arange(half, device=place.device) * (-math.log(10_000) / max(half - 1, 1)))
    angle = place[..., None].float() * rate
    return torch.cat([angle.sin(), angle.cos()], -1)[..., :dim]
