"""Conversations to token rows: labels by construction, and branches that share one media prefix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mmllm.data.fitting import Piece, chosen_parts, grow, media_within
from mmllm.data.interleaved import is_document
from mmllm.errors import UserError

IGNORE = -100
MEDIA = {"image": "image", "image_url": "image", "audio": "audio", "input_audio": "audio"}
CUT = "\u241ecut\u241e"  # marks the end of the shared prefix while rendering; never reaches the tokenizer


@dataclass
class Conversation:
    """A tokenised record, placeholders not yet repeated: one id stands for a whole picture or sound.

    Attributes:
        prefix: what all branches share; empty when the record has no branches.
        branches: continuations of the prefix, blind to each other; an ordinary conversation is one branch.
        prefix_media, branch_media: (kind, source) in the order of the placeholders.
    """

    prefix: Piece
    branches: list[Piece]
    prefix_media: list[tuple[str, Any]] = field(default_factory=list)
    branch_media: list[list[tuple[str, Any]]] = field(default_factory=list)


@dataclass
class Encoded:
    """One row: lists of the same length, and the media in the order of their placeholders.

    Attributes:
        branch_ids: 0 in the shared prefix, k in branch k.
        position_ids: restart after the prefix in every branch.
    """

    input_ids: list[int]
    labels: list[int]
    position_ids: list[int]
    branch_ids: list[int]
    media: list[tuple[str, Any]]


def branch_mask(branch_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive mask [B, 1, L, L]: causal, and a token sees the prefix (0) and its own branch only.

    Args:
        branch_ids: [B, L] int; 0 prefix, k >= 1 branch, -1 padding (sees only itself, seen by nobody else).
        dtype: float type of the LLM; the mask must be additive (a 0/1 mask is silently wrong in transformers).
    """
    length = branch_ids.shape[1]
    same = branch_ids[:, :, None] == branch_ids[:, None, :]
    seen = same | (branch_ids[:, None, :] == 0)
    seen &= torch.ones(length, length, dtype=torch.bool, device=branch_ids.device).tril()
    seen &= branch_ids[:, None, :] >= 0
    seen |= torch.eye(length, dtype=torch.bool, device=branch_ids.device)
    mask = torch.zeros(seen.shape, dtype=dtype, device=branch_ids.device)
    return mask.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]


def media_of(messages: Sequence[dict[str, Any]]) -> list[tuple[str, Any]]:
    """The pictures and sounds of a conversation in order: ("image" | "audio", path or loaded object).

    Raises:
        UserError: a part without its medium, or of an unknown type.
    """
    out: list[tuple[str, Any]] = []
    for message in messages:
        if isinstance(message["content"], str):
            continue
        for part in message["content"]:
            kind = part.get("type")
            if kind == "text":
                continue
            if kind not in MEDIA:
                raise UserError(f"content part of unknown type '{kind}'", do="use text, image or audio")
            keys = (kind, "path", "url", "image", "audio")
            source = next((part[k] for k in keys if part.get(k) is not None), None)
            if isinstance(source, dict):  # OpenAI's {"image_url": {"url": ...}}
                source = source.get("url")
            if source is None:
                raise UserError(f"a part of type '{kind}' names no file", do='give "path"')
            out.append((MEDIA[kind], source))
    return out


def _parts(content: Any) -> list[dict[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def join_messages(prefix: Sequence[dict[str, Any]], branch: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Prefix and branch as one conversation; touching messages of one role become one message."""
    out = [dict(m) for m in prefix]
    for k, message in enumerate(branch):
        if k == 0 and out and out[-1]["role"] == message["role"]:
            out[-1]["content"] = _parts(out[-1]["content"]) + _parts(message["content"])
        else:
            out.append(dict(message))
    return out


def split_turns(messages: Sequence[dict[str, Any]], render: Callable[..., str]) -> list[tuple[str, bool]]:
    """A conversation as rendered pieces (text, is_answer) whose join is the rendered conversation.

    An answer's piece is what the template adds for that message after its generation prompt, so labels follow from the
    pieces and nothing is searched in the text.

    Raises:
        UserError: the template rewrites earlier turns, so that pieces can't be cut.
    """
    pieces: list[tuple[str, bool]] = []
    done = ""
    for k, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = render(list(messages[:k]), add_generation_prompt=True)
        full = render(list(messages[: k + 1]))
        if not prompt.startswith(done) or not full.startswith(prompt):
            raise UserError("the LLM's chat template changes earlier turns", do="use another LLM, or set chat_template")
        pieces += [(prompt[len(done) :], False), (full[len(prompt) :], True)]
        done = full
    whole = render(list(messages))
    if not whole.startswith(done):
        raise UserError("the LLM's chat template changes earlier turns", do="use another LLM, or set chat_template")
    if whole[len(done) :]:
        pieces.append((whole[len(done) :], False))
    return pieces


def _tokens(pieces: Sequence[tuple[str, bool]], processor: Any) -> Piece:
    """Tokenises piece by piece. An answer's labels end with the token that closes it; what follows is prompt again."""
    special = set(processor.tokenizer.all_special_ids)
    out = Piece([], [])
    for text, answer in pieces:
        ids = processor.text_ids(text)
        out.ids += ids
        if answer:
            end = next((i + 1 for i, t in enumerate(ids) if t in special), len(ids))
            out.labels += ids[:end] + [IGNORE] * (len(ids) - end)
            out.ends.append(len(out.ids) - len(ids) + end)
        else:
            out.labels += [IGNORE] * len(ids)
    while out.labels and out.labels[-1] == IGNORE and pieces[-1][1]:  # nothing is learned after the last answer
        out.ids.pop()
        out.labels.pop()
    return out


def _document(message: dict[str, Any], processor: Any) -> Piece:
    """A plain document: its texts are all learned, media stand in their places, the tokenizer's end token closes it."""
    tokenizer, out = processor.tokenizer, Piece([], [])
    marks = {"image": processor.image_token_id, "audio": processor.audio_token_id}
    start = tokenizer.bos_token_id
    if start is not None and tokenizer("a")["input_ids"][:1] == [start]:
        out.ids, out.labels = [start], [IGNORE]
    for part in _parts(message["content"]):
        text = part.get("type") == "text"
        ids = processor.plain_ids(part["text"]) if text else [marks[MEDIA[part["type"]]]]
        out.ids += ids
        out.labels += ids if text else [IGNORE]
        if text:
            out.ends.append(len(out.ids))
    if tokenizer.eos_token_id is not None:
        out.ids.append(tokenizer.eos_token_id)
        out.labels.append(tokenizer.eos_token_id)
    return out


def tokenise_conversation(record: dict[str, Any], processor: Any) -> Conversation:
    """Renders and tokenises a record (``messages`` with optional ``branches``), once; media are not opened.

    Raises:
        UserError: no messages, a malformed message, or a template that can't be cut into pieces.
    """
    where = record.get("id")
    messages = record.get("messages")
    if not messages:
        raise UserError("a conversation without messages", where)
    try:
        branches = record.get("branches")
        if is_document(messages):
            media = media_of(messages)
            return Conversation(Piece([], []), [_document(messages[0], processor)], [], [media])
        if not branches:
            pieces = split_turns(messages, processor.render)
            return Conversation(Piece([], []), [_tokens(pieces, processor)], [], [media_of(messages)])
        marked = join_messages(messages, [{"role": messages[-1]["role"], "content": [{"type": "text", "text": CUT}]}])
        if branches[0][0]["role"] != messages[-1]["role"]:
            marked = [*messages, {"role": branches[0][0]["role"], "content": [{"type": "text", "text": CUT}]}]
        shared = processor.render(marked).split(CUT)[0]
        out = Conversation(_tokens([(shared, False)], processor), [], media_of(messages))
        for branch in branches:
            pieces = split_turns(join_messages(messages, branch), processor.render)
            first, answer = pieces[0]
            if answer or not first.startswith(shared):
                raise UserError("a branch does not continue the shared messages", where)
            out.branches.append(_tokens([(first[len(shared) :], False), *pieces[1:]], processor))
            out.branch_media.append(media_of(branch))
        return out
    except (KeyError, TypeError, IndexError) as e:
        raise UserError(f"malformed conversation ({type(e).__name__}: {e})", where, "see the record format") from None


def media_tokens(processor: Any, audio_tokens: Callable[[Any], int] | None) -> Callable[[str, Any], int]:
    """How many LLM tokens a medium has, from its kind and source; a sound has one where nobody can tell."""

    def count(kind: str, source: Any) -> int:
        if kind == "image":
            return processor.picture_tokens(source)
        return audio_tokens(source) if audio_tokens else 1

    return count


def assemble(
    conversation: Conversation,
    processor: Any,
    audio_tokens: Callable[[Any], int] | None = None,
    choose: Sequence[int] | None = None,
    max_length: int | None = None,
) -> Encoded:
    """One row from a tokenised conversation.

    Args:
        audio_tokens: source -> number of LLM tokens of that sound.
        choose: which branches, in which order; None takes all.
        max_length: branches that don't fit are left out whole; a single branch is cut after a turn (a document after a
            text), see ``chosen_parts``.

    Raises:
        UserError: not even the first turn fits.
    """
    marks, count = (processor.image_token_id, processor.audio_token_id), media_tokens(processor, audio_tokens)
    prefix = grow(conversation.prefix, conversation.prefix_media, marks, count)
    row = Encoded([], [], [], [], list(conversation.prefix_media))

    def add(piece: Piece, branch: int, start: int, length: int) -> None:
        row.input_ids += piece.ids[:length]
        row.labels += piece.labels[:length]
        row.position_ids += range(start, start + length)
        row.branch_ids += [branch] * length

    add(prefix, 0, 0, len(prefix.ids))
    order = range(len(conversation.branches)) if choose is None else choose
    pieces = {k: grow(conversation.branches[k], conversation.branch_media[k], marks, count) for k in order}
    ends = {k: [*p.ends, len(p.ids)] for k, p in pieces.items()}
    parts = chosen_parts(len(prefix.ids), ends, order, max_length)
    if not parts and order:
        raise UserError(f"no turn ends within {max_length} tokens", do="raise max_length")
    for used, (k, length) in enumerate(parts, 1):
        add(pieces[k], used, len(prefix.ids), length)
        row.media += media_within(pieces[k].ids[:length], conversation.branch_media[k], marks, count)
    return row


def encode_conversation(record: dict[str, Any], processor: Any, **kwargs: Any) -> Encoded:
    """Record -> row, in one go; sounds are opened to count their tokens. See ``assemble`` for the keywords."""

    def audio_tokens(source: Any) -> int:
        return processor.media_inputs([], [processor.load_audio(source)])[1][0]

    kwargs.setdefault("audio_tokens", audio_tokens)
    return assemble(tokenise_conversation(record, processor), processor, **kwargs)


def answer_weights(labels: Tensor, power: float) -> Tensor:
    """Weights [B, L] of labelled tokens: an answer of n tokens gives each of them n^-power (0: all tokens count alike,
    1: all answers do). Without it a box of twenty tokens drowns ten answers of yes or no.
    """
    asked = labels != IGNORE
    starts = asked & ~torch.cat([torch.zeros_like(asked[:, :1]), asked[:, :-1]], dim=1)
    answer = starts.flatten().cumsum(0).view_as(labels) * asked  # 0 where nothing is asked
    length = torch.bincount(answer.flatten()).to(torch.float32).clamp(min=1)
    return length[answer].pow(-power) * asked


def collate(rows: Sequence[Encoded], pad_id: int) -> dict[str, Tensor]:
    """Rows -> ``input_ids``, ``labels``, ``position_ids``, ``attention_mask``; ``branch_ids`` where there are branches.

    All [B, L], padded on the right. ``branch_ids`` stand in for the attention mask; -1 marks padding.
    """
    length = max(len(r.input_ids) for r in rows)

    def padded(name: str, fill: int) -> Tensor:
        out = torch.full((len(rows), length), fill)
        for i, row in enumerate(rows):
            values = getattr(row, name)
            out[i, : len(values)] = torch.tensor(values, dtype=torch.long)
        return out

    batch = {
        "input_ids": padded("input_ids", pad_id),
        "labels": padded("labels", IGNORE),
        "position_ids": padded("position_ids", 0),
    }
    branch_ids = padded("branch_ids", -1)
    batch["attention_mask"] = (branch_ids >= 0).long()
    if int(branch_ids.max()) > 1:
        batch["branch_ids"] = branch_ids
    return batch
