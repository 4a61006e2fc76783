"""What of a conversation fits a row: placeholders grown to their media's tokens, cuts at turn borders alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MediaTokens = Callable[[str, Any], int]  # kind and source of a medium -> its LLM tokens


@dataclass
class Piece:
    """Token ids, and whether they are an answer to be learned.

    Attributes:
        ends: lengths to which the piece may be cut: after each answer, after each text of a document.
    """

    ids: list[int]
    labels: list[int]
    ends: list[int] = field(default_factory=list)


def grow(piece: Piece, media: Sequence[tuple[str, Any]], marks: Sequence[int | None], tokens: MediaTokens) -> Piece:
    """The piece with each placeholder (an id of ``marks``) repeated as often as its medium has tokens."""
    if not media:
        return piece
    sources, out, ends = iter(media), Piece([], []), set(piece.ends)
    for at, (token, label) in enumerate(zip(piece.ids, piece.labels), 1):
        n = tokens(*next(sources)) if token in marks else 1
        out.ids += [token] * n
        out.labels += [label] * n
        if at in ends:
            out.ends.append(len(out.ids))
    return out


def grown_ends(
    piece: Piece, media: Sequence[tuple[str, Any]], marks: Sequence[int | None], tokens: MediaTokens
) -> list[int]:
    """The lengths to which ``grow(...)`` may be cut, the whole of it last, without making it."""
    extra, at = [0] * (len(piece.ids) + 1), [i for i, t in enumerate(piece.ids) if media and t in marks]
    for place, medium in zip(at, media):
        extra[place + 1] = tokens(*medium) - 1
    total, ends = 0, []
    wanted = {*piece.ends, len(piece.ids)}
    for length, more in enumerate(extra):
        total += more
        if length in wanted:
            ends.append(length + total)
    return ends


def chosen_parts(
    prefix: int,
    ends: Sequence[Sequence[int]] | Mapping[int, Sequence[int]],
    order: Sequence[int],
    max_length: int | None,
) -> list[tuple[int, int]]:
    """(branch, length kept) of what a row holds after a prefix of so many tokens.

    A branch that does not fit beside others is left out; the first one is cut to the longest of its ``ends`` that fits.

    Returns:
        an empty list when no turn fits.
    """
    total, parts = prefix, []
    for k in order:
        room = ends[k][-1] if max_length is None else max_length - total
        fits = [e for e in ends[k] if e <= room]
        whole = bool(fits) and fits[-1] == ends[k][-1]
        if whole or (fits and not parts):
            parts.append((k, fits[-1]))
            total += fits[-1]
    return parts


def media_within(
    ids: Sequence[int], media: Sequence[tuple[str, Any]], marks: Sequence[int | None], tokens: MediaTokens
) -> list[tuple[str, Any]]:
    """Those media whose tokens stand in the ids of a grown piece that was cut after a turn."""
    left, kept = sum(t in marks for t in ids), []
    for medium in media:
        if left <= 0:
            break
        left -= tokens(*medium)
        kept.append(medium)
    return kept
