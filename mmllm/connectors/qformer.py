"""The query transformer: K learned queries read the tower's tokens by cross-attention (BLIP-2, arXiv 2301.12597).

With a text (InstructBLIP, arXiv 2305.06500) the queries also see the question, and so choose what to bring along.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from mmllm.blocks.cross_attention import CrossAttention, feed_forward
from mmllm.connectors.base import FolderConnector, GridPositions
from mmllm.contracts import Features
from mmllm.errors import UserError
from mmllm.registry import register


class _Block(nn.Module):
    """Self-attention among the queries, cross-attention to the tower where asked, feed-forward; all pre-norm.

    Text tokens share the self-attention with the queries and have a feed-forward of their own; they never look at the
    tower. A last block whose text nobody reads only lets the queries look at it.
    """

    def __init__(self, dim: int, memory_dim: int, heads: int, cross: bool, dropout: float, text: bool):
        super().__init__()
        self.norm_self, self.self_attention = nn.LayerNorm(dim), CrossAttention(dim, dim, heads)
        self.norm_cross = nn.LayerNorm(dim) if cross else None
        self.cross_attention = CrossAttention(dim, memory_dim, heads) if cross else None
        self.norm_mlp = nn.LayerNorm(dim)
        self.mlp = feed_forward(dim, dropout)
        self.norm_text = nn.LayerNorm(dim) if text else None
        self.mlp_text = feed_forward(dim, dropout) if text else None

    def forward(
        self, x: Tensor, memory: Tensor, allowed: Tensor, text: Tensor | None = None, seen: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Queries x [B, K, D], memory [B, N, M], text [B, L, D] -> queries, text.

        Args:
            seen: bool, which of queries and text the self-attention may look at: [B, K + L], or, where not all may look
                at the same, [B, K + L, K + L].
        """
        y = self.norm_self(x)
        if text is None or seen is None:
            x = x + self.self_attention(y, y)
        else:
            both = torch.cat([y, self.norm_self(text)], 1)
            if self.mlp_text is None or self.norm_text is None:
                x, text = x + self.self_attention(y, both, seen if seen.ndim == 2 else seen[:, : x.shape[1]]), None
            else:
                mixed = self.self_attention(both, both, seen)
                x, text = x + mixed[:, : x.shape[1]], text + mixed[:, x.shape[1] :]
                text = text + self.mlp_text(self.norm_text(text))
        if self.cross_attention is not None and self.norm_cross is not None:
            x = x + self.cross_attention(self.norm_cross(x), memory, allowed)
        return x + self.mlp(self.norm_mlp(x)), text

    def read(self, text: Tensor, text_mask: Tensor) -> Tensor:
        """Text [B, L, D] by itself, with its mask [B, L]."""
        assert self.norm_text is not None and self.mlp_text is not None
        y = self.norm_self(text)
        text = text + self.self_attention(y, y, text_mask)
        return text + self.mlp_text(self.norm_text(text))


@register("connector", "qformer")
class QFormerConnector(FolderConnector):
    """``num_queries`` learned queries pass through ``num_layers`` blocks with cross-attention every ``cross_every``.

    Always gives ``num_queries`` tokens, whatever the input's length; padding and order of the padding don't matter.

    Args:
        text_dim: width of a text that the queries see too (in a multimodal LLM the width of its word embeddings, which
            ``text_dim: auto`` stands for there); None: they see none.
        text_output: whether the text goes through the last block, too, for ``joint``; asked for by the first stage
            (the objective ``qformer``).
        positions: adds vectors of row and column to the tower's tokens, for towers that don't know places by themselves
            (convolutions); grid: how many there are.
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
        text_output: bool = False,
        positions: bool = False,
        grid: tuple[int, int] | list[int] | None = None,
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
        if text_output and text_dim is None:
            raise UserError("text_output, but no text_dim", "connector 'qformer'", "set text_dim: auto")
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
            **({"text_output": True} if text_output else {}),
            **({"positions": True, "grid": list(grid)} if positions and grid is not None else {}),
        )
        self.num_queries = num_queries
        self.queries = nn.Parameter(torch.randn(num_queries, hidden_dim) * 0.02)
        self.norm_in = nn.LayerNorm(in_dim)
        self.blocks = nn.ModuleList(
            _Block(
                hidden_dim,
                in_dim,
                num_heads,
                i % cross_every == 0,
                dropout,
                text=text_dim is not None and (text_output or i < num_layers - 1),
            )
            for i in range(num_layers)
        )
        self.positions = GridPositions(in_dim, grid, "qformer") if positions else None
        self.norm_out = nn.LayerNorm(hidden_dim)
        self.out = nn.Linear(hidden_dim, out_dim)
        self.text_in = nn.Linear(text_dim, hidden_dim) if text_dim is not None else None
        self.norm_text_out = nn.LayerNorm(hidden_dim) if text_output else None

    text_parts = ("text_in.", "norm_text.", "mlp_text.", "norm_text_out.")

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
        words, seen = None, None
        if text is not None:
            words, there = self._words(text)
            seen = torch.cat([there.new_ones(len(there), self.num_queries), there], 1)
        x, _, mask = self._run(features, words, seen)
        return self.out(self.norm_out(x)), mask.any(1, keepdim=True).expand(-1, self.num_queries)

    def joint(
        self, features: Features, text: Features, attention: str, start: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and text side by side, as the first stage trains them (BLIP-2, section 3.1 and figure 2).

        Args:
            features: of B inputs, with one row of text for each.
            attention: ``bidirectional``: all see all; ``causal``: queries do not see the text, a text token sees the
                queries and the text up to itself.
            start: [hidden_dim], a first text token ([CLS] or [DEC] of the paper).

        Returns:
            Queries [B, num_queries, hidden_dim], text [B, 1 + L, hidden_dim], and the text's mask [B, 1 + L].

        Raises:
            UserError: a connector without ``text_output``.
            ValueError: another ``attention``.
        """
        words, there = self._started(text, start)
        x, words, _ = self._run(features, words, joint_mask(attention, self.num_queries, there))
        return self.norm_out(x), self._finished(words), there

    def separate(self, features: Features, text: Features, start: Tensor) -> tuple[Tensor, Tensor]:
        """Queries [B, num_queries, hidden_dim] and text [T, 1 + L, hidden_dim], neither seeing the other.

        The unimodal attention of BLIP-2; inputs and texts need not be as many. Arguments as for ``joint``.

        Raises:
            UserError: a connector without ``text_output``.
        """
        words, there = self._started(text, start)
        x, _, _ = self._run(features, None, None)
        for block in cast(Iterable[_Block], self.blocks):
            words = block.read(words, there)
        return self.norm_out(x), self._finished(words)

    def _started(self, text: Features, start: Tensor) -> tuple[Tensor, Tensor]:
        if self.norm_text_out is None:
            raise UserError("this query transformer's text has no output", "connector 'qformer'", "set text_output")
        words, there = self._words(text)
        words = torch.cat([start.to(words.dtype).expand(len(words), 1, -1), words], 1)
        return words, torch.cat([there.new_ones(len(there), 1), there], 1)

    def _finished(self, words: Tensor | None) -> Tensor:
        assert words is not None and self.norm_text_out is not None
        return self.norm_text_out(words)

    def _run(
        self, features: Features, words: Tensor | None, seen: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Queries, text and the mask of the tower's tokens, after all blocks."""
        # Class tokens stay: queries can use them, and they cost no output token.
        tokens, mask = self.content(Features(features.tokens, features.mask, features.pooled))
        x, memory = self.queries.expand(len(tokens), -1, -1), self.norm_in(tokens)
        memory = memory if self.positions is None else self.positions(memory, features.grid, features.num_prefix)
        for block in self.blocks:
            x, words = block(x, memory, mask, words, seen)
        return x, words, mask

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


def joint_mask(attention: str, queries: int, text_mask: Tensor) -> Tensor:
    """What queries and text may look at in ``QFormerConnector.joint``: text_mask [B, L] -> bool [B, K + L, K + L].

    Raises:
        ValueError: another ``attention`` than bidirectional or causal.
    """
    if attention not in ("bidirectional", "causal"):
        raise ValueError(f"attention {attention!r}: bidirectional or causal")
    size = queries + text_mask.shape[1]
    there = torch.cat([text_mask.new_ones(len(text_mask), queries), text_mask], 1)
    pairs = torch.ones(size, size, dtype=torch.bool, device=text_mask.device)
    if attention == "causal":
        pairs[:queries, queries:] = False
        pairs[queries:, queries:] = pairs[queries:, queries:].tril()
    return pairs & there[:, None]


def sinusoids(place: Tensor, dim: int) -> Tensor:
    """Places [...] -> [..., dim]: sines, then cosines, of wavelengths from 2 pi to 10,000 times that."""
    half = (dim + 1) // 2
    rate = torch.exp(torch.arange(half, device=place.device) * (-math.log(10_000) / max(half - 1, 1)))
    angle = place[..., None].float() * rate
    return torch.cat([angle.sin(), angle.cos()], -1)[..., :dim]
