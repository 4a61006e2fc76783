"""Where media stand in token rows: their tokens put in place of placeholders, and the words that stand around them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmllm.contracts import Features
from mmllm.errors import UserError


@dataclass
class Placed:
    """The media of one kind after their connector, in the order of the batch.

    Attributes:
        tokens: [n, M, H]; mask: [n, M].
        rows, columns: [n], where each one's first placeholder stands.
    """

    tokens: Tensor
    mask: Tensor
    rows: Tensor
    columns: Tensor


def cached_features(tokens: Tensor, mask: Tensor | None, grid: tuple[int, int, int] | None) -> Features:
    """Features from stored tower tokens [n, N, D]; towers give class tokens no place in the cache."""
    if mask is None:
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    return Features(tokens, mask.bool(), tokens[:, 0], grid=grid)


def starts(where: Tensor, counts: Tensor, what: str) -> tuple[Tensor, Tensor]:
    """Rows and columns [n] of the first placeholder of each medium.

    Args:
        where: [B, L] bool, the placeholders; counts: [n] how many of them each medium takes, in order.

    Raises:
        UserError: the number of placeholders is another.
    """
    rows, columns = where.nonzero(as_tuple=True)
    if len(rows) != int(counts.sum()):
        raise UserError(
            f"the text has {len(rows)} placeholders for {what} tokens, the {what}s give {int(counts.sum())}",
            do="make the inputs with the model's own processor",
        )
    first = counts.cumsum(0) - counts
    if not len(rows):
        return rows, columns
    first = first.clamp(max=len(rows) - 1)
    return rows[first], columns[first]


def put(embeds: Tensor, where: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """Puts the valid tokens [n, M, H] into embeds [B, L, H] where the placeholder mask [B, L] is True, in order."""
    return embeds.masked_scatter(where[..., None].expand_as(embeds), tokens[mask].to(embeds.dtype))


def words_around(
    input_ids: Tensor,
    embeds: Tensor,
    rows: Tensor,
    columns: Tensor,
    turn_ids: Sequence[int],
    media_ids: Sequence[int | None],
    documents: Tensor | None = None,
) -> Features:
    """The text of the turn that each medium stands in, as a query transformer's second input.

    A turn lies between two of the template's own special tokens, so the text is the same in training and in
    generation, whatever answers and turns follow.

    Args:
        input_ids, embeds: [B, L], [B, L, H].
        rows, columns: [n] places of the media.
        turn_ids: the special tokens that part turns (padding among them); media_ids: the placeholders.
        documents: [B, L] of a packed row.

    Returns:
        tokens [n, T, H] and mask [n, T]; T is 1 at least, all masked for a medium without words.
    """
    border = torch.isin(input_ids, torch.tensor(list(turn_ids), device=input_ids.device))
    turn = border.cumsum(1)
    word = ~border & ~torch.isin(input_ids, torch.tensor([i for i in media_ids if i is not None]).to(input_ids.device))
    own = word[rows] & (turn[rows] == turn[rows, columns][:, None])  # [n, L]
    if documents is not None:
        own &= documents[rows] == documents[rows, columns][:, None]
    length = max(int(own.sum(1).max()), 1) if len(own) else 1
    index = own.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :length]
    mask = own.gather(1, index)
    tokens = embeds[rows[:, None], index] * mask[..., None].to(embeds.dtype)
    return Features(tokens, mask, tokens.mean(1))
