"""Text operations that make a view: the same media under other words."""

from __future__ import annotations

from typing import Any

from mmllm.decode.spec import Op

Messages = list[dict[str, Any]]  # content is a list of parts; media parts carry only their type


def change_messages(op: Op, messages: Messages) -> Messages:
    """The messages after ``system``, ``prefix`` or ``after_media``.

    ``system`` replaces the system prompt or sets one; ``prefix`` stands before the last question; ``after_media``
    stands behind the last picture or sound, or before the question when there is none.
    """
    if op.name == "system":
        first = {"role": "system", "content": [_text(op["text"])]}
        return [first, *(m for m in messages if m["role"] != "system")]
    asked = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=len(messages) - 1)
    if op.name == "after_media":
        shown = [i for i, m in enumerate(messages) if any(p["type"] != "text" for p in m["content"])]
        asked = shown[-1] if shown else asked
    parts = list(messages[asked]["content"])
    at = max((i + 1 for i, p in enumerate(parts) if p["type"] != "text"), default=0)
    if op.name == "prefix":
        at = max((i for i, p in enumerate(parts) if p["type"] == "text"), default=len(parts))
    changed = {**messages[asked], "content": [*parts[:at], _text(op["text"] + " "), *parts[at:]]}
    return [*messages[:asked], changed, *messages[asked + 1 :]]


def without_media(messages: Messages, dropped: set[int], instead: str | None = None) -> Messages:
    """The messages without the media of the given places; ``instead`` stands where the first of them stood."""
    place, out = 0, []
    for message in messages:
        parts = []
        for part in message["content"]:
            if part["type"] == "text":
                parts.append(part)
                continue
            if place not in dropped:
                parts.append(part)
            elif instead is not None:
                parts.append(_text(instead + "\n"))
                instead = None
            place += 1
        out.append({**message, "content": parts})
    return out


def asking_instead(messages: list[dict[str, Any]], question: str) -> list[dict[str, Any]]:
    """The caller's messages with all their media, and this question in place of all words."""
    media = [p for m in messages if not isinstance(m["content"], str) for p in m["content"] if p["type"] != "text"]
    return [{"role": "user", "content": [*media, _text(question)]}]


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}
