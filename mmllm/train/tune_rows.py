"""The last look at the data before the first step: unreadable media, turns that fit no row, chat templates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError

from mmllm.data.chat_batches import record_media
from mmllm.data.conversations import (
    Conversation,
    join_messages,
    media_tokens,
    split_turns,
    tokenise_conversation,
)
from mmllm.data.fitting import chosen_parts, grown_ends
from mmllm.data.interleaved import is_document
from mmllm.data.rejected import Rejected
from mmllm.errors import UserError
from mmllm.model import MMLLMProcessor
from mmllm.train.chat_data import ChatData
from mmllm.train.chat_media import ChatMedia
from mmllm.train.tune_config import TuneConfig


def fitting(
    data: ChatData, processor: MMLLMProcessor, media: ChatMedia, config: TuneConfig, rejected: Rejected
) -> tuple[ChatData, dict[int, Conversation]]:
    """The data without what cannot become a row, and those conversations that had to be tokenised to know it.

    Left out are records with a medium that could not be read, whose turns the LLM's template refuses, and of which a
    question, or the first turn, does not fit ``max_length``.

    Raises:
        UserError: more of a source's records are left out than allowed.
    """
    roles, found = Roles(processor), {}

    def problem(record: dict[str, Any]) -> str | None:
        why = next((w for _, source in record_media(record) if (w := media.problem(source)) is not None), None)
        if why is not None:
            return why
        try:
            overhead = max((roles.overhead(t) for t in threads_of(record)), default=0)
            if most_tokens(record, processor, media, overhead) <= config.max_length:
                return None
            found[id(record)] = conversation = tokenise_conversation(record, processor)
        except UserError as e:
            return e.what
        return too_long(conversation, processor, media, config.max_length)

    data = data.screened(problem, rejected)
    return data, {n: found[id(r)] for n, r in enumerate(data.records) if id(r) in found}


def threads_of(record: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """The conversations in a record, each branch with the messages that it continues."""
    messages = record["messages"]
    return [join_messages(messages, b) for b in record.get("branches") or []] or [list(messages)]


class Roles:
    """Tries the chat template on each order of roles once; what it puts around texts depends on nothing else."""

    def __init__(self, processor: MMLLMProcessor):
        self.processor = processor
        self._known: dict[tuple[str, ...], int | str] = {}

    def overhead(self, messages: Sequence[dict[str, Any]]) -> int:
        """Bytes of the template around messages of these roles.

        Raises:
            UserError: the template refuses such an order, or can't be cut into turns.
        """
        order = tuple(m["role"] for m in messages)
        if order not in self._known:
            self._known[order] = self._tried(messages)
        known = self._known[order]
        if isinstance(known, str):
            raise UserError(known)
        return known

    def _tried(self, messages: Sequence[dict[str, Any]]) -> int | str:
        if is_document(messages):
            return 0
        try:
            pieces = split_turns([{"role": m["role"], "content": "x"} for m in messages], self.processor.render)
        except TemplateError as e:
            return f"the LLM's chat template refuses the roles {', '.join(m['role'] for m in messages)} ({e})"
        except UserError as e:
            return e.what
        return sum(len(text.encode()) + 1 for text, _ in pieces)


def most_tokens(record: dict[str, Any], processor: MMLLMProcessor, media: ChatMedia, overhead: int) -> int:
    """At most so many tokens has the longest thread of a record: no tokenizer makes more than one of a byte."""
    count, longest = media_tokens(processor, media.audio_tokens), 0
    for thread in threads_of(record):
        total = overhead + 4
        for message in thread:
            content = message["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            total += sum(len(p["text"].encode()) + 2 for p in parts if p["type"] == "text")
        longest = max(longest, total)
    return longest + sum(count(kind, source) for kind, source in record_media(record))


def too_long(conversation: Conversation, processor: MMLLMProcessor, media: ChatMedia, max_length: int) -> str | None:
    """What of a conversation cannot be brought into a row of ``max_length`` by cutting after a turn."""
    marks = (processor.image_token_id, processor.audio_token_id)
    count = media_tokens(processor, media.audio_tokens)
    prefix = grown_ends(conversation.prefix, conversation.prefix_media, marks, count)[-1]
    for number, (branch, own) in enumerate(zip(conversation.branches, conversation.branch_media)):
        ends = grown_ends(branch, own, marks, count)
        if not chosen_parts(prefix, [ends], [0], max_length):
            what = "the first turn" if len(conversation.branches) == 1 else f"question {number + 1}"
            return f"{what} ends after {prefix + ends[0]:,} tokens, max_length is {max_length:,}"
    return None
