"""Captions and plain texts as conversations, so that an LLM can be trained on records of any form."""

from __future__ import annotations

from typing import Any

from mmllm.data.captions import captions_of
from mmllm.data.interleaved import DOCUMENT
from mmllm.data.records import MEDIA_FIELDS
from mmllm.errors import UserError


def to_conversation(record: dict[str, Any]) -> dict[str, Any]:
    """The record with ``messages`` (and ``branches``).

    A text beside media is a caption, the answer to the media alone; several captions are branches. A text alone is a
    plain document. Conversations stay as they are.

    Raises:
        UserError: there is nothing to learn.
    """
    if record.get("messages"):
        return record
    rest = {k: v for k, v in record.items() if k not in (*MEDIA_FIELDS, "text", "label")}
    media = [{"type": kind, "path": path} for kind in MEDIA_FIELDS for path in _listed(record.get(kind))]
    texts = [text for _, text in captions_of(record) if isinstance(text, str) and text.strip()]
    if not texts:
        do = "turn its boxes into questions with recipes: [grounding]" if record.get("boxes") else None
        raise UserError("nothing to learn in it (no messages and no text)", do=do)
    if not media:
        return {**rest, "messages": [{"role": DOCUMENT, "content": [{"type": "text", "text": texts[0]}]}]}
    answers = [[{"role": "assistant", "content": [{"type": "text", "text": text}]}] for text in texts]
    asked = [{"role": "user", "content": media}]
    if len(answers) == 1:
        return {**rest, "messages": [*asked, *answers[0]]}
    return {**rest, "messages": asked, "branches": answers}


def _listed(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list) else [value]
