"""Where the media of messages stand: in their own parts in several spellings, or beside the messages in a list."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from mmllm.errors import UserError

MEDIA_FIELDS = ("image", "audio", "video")
PLACEHOLDER = re.compile(r"\s*<(image|audio|video)>\s*")
SPELLINGS = {"image_url": "image", "input_audio": "audio", "audio_url": "audio", "video_url": "video"}


def with_media_parts(record: dict[str, Any], where: object = None) -> dict[str, Any]:
    """A record with ``messages`` whose media are parts ``{"type": "image", "path": ...}`` of its messages.

    OpenAI's ``image_url`` and ``input_audio``, and transformers' ``image`` and ``url``, become ``path``. Media in
    fields of their own (``images``, ``image``, ...) take the places that the messages leave for them: parts that name
    no file, or ``<image>`` marks in strings. Without any place they come first, as in LLaVA's data.

    Raises:
        UserError: places and media differ in number.
    """
    names = [n for n in ("messages", "branches") if isinstance(record.get(n), list)]
    out = dict(record)
    if "messages" in names:
        out["messages"] = [_plain(m) for m in record["messages"]]
    if "branches" in names:
        out["branches"] = [[_plain(m) for m in b] if isinstance(b, list) else b for b in record["branches"]]
    threads = [out.get("messages") or [], *(out.get("branches") or [])]
    fields = {k: _listed(record.get(k, record.get(f"{k}s"))) for k in MEDIA_FIELDS}
    if not any(fields.values()) or any(p.get("path") is not None for t in threads for p in _parts(t)):
        return out
    waiting = {k: list(v) for k, v in fields.items()}
    threads = [[_filled(m, waiting, where) for m in thread] for thread in threads]
    for kind, left in waiting.items():
        given = len(fields[kind])
        if 0 < len(left) < given:
            raise UserError(f"fewer places for {kind}s ({given - len(left)}) than {kind}s ({given})", where)
        first = next((m for m in threads[0] if isinstance(m, dict) and m.get("role") == "user"), None)
        if left and first is not None:
            first["content"][:0] = [{"type": kind, "path": path} for path in left]
    out = {k: v for k, v in out.items() if k not in MEDIA_FIELDS and k.removesuffix("s") not in MEDIA_FIELDS}
    return {**out, "messages": threads[0], **({"branches": threads[1:]} if "branches" in names else {})}


def _plain(message: Any) -> Any:
    """The message with the media of its parts under ``path``, in any of their spellings."""
    if not isinstance(message, dict) or not isinstance(message.get("content"), list):
        return message
    return {**message, "content": [_plain_part(part) for part in message["content"]]}


def _plain_part(part: Any) -> Any:
    if not isinstance(part, dict) or part.get("type") in (None, "text") or part.get("path") is not None:
        return part
    kind = SPELLINGS.get(part["type"], part["type"])
    source = next((part[k] for k in (part["type"], "url", *MEDIA_FIELDS) if part.get(k) is not None), None)
    if isinstance(source, dict) and "url" in source:
        source = source["url"]
    elif isinstance(source, dict) and "data" in source:
        source = f"data:audio/{source.get('format', 'wav')};base64,{source['data']}"
    if kind not in MEDIA_FIELDS or not isinstance(source, str | bytes):
        return part
    return {"type": kind, "path": source}


def _filled(message: Any, waiting: dict[str, list[Any]], where: object) -> Any:
    """A message whose empty media parts and marks have taken media out of ``waiting``."""
    if not isinstance(message, dict):
        return message

    def taken(kind: str) -> dict[str, Any]:
        if not waiting[kind]:
            raise UserError(f"more places for {kind}s than {kind}s", where)
        return {"type": kind, "path": waiting[kind].pop(0)}

    content: list[Any] = []
    given = message.get("content")
    for part in [{"type": "text", "text": given}] if isinstance(given, str) else given or []:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in MEDIA_FIELDS:
            content.append(taken(str(kind)))
        elif kind == "text" and isinstance(given, str):
            for i, piece in enumerate(PLACEHOLDER.split(given)):
                content += [taken(piece)] if i % 2 else [{"type": "text", "text": piece}] if piece else []
        else:
            content.append(part)
    return {**message, "content": content}


def _parts(messages: Sequence[Any]) -> list[dict[str, Any]]:
    contents = [m.get("content") for m in messages if isinstance(m, dict)]
    return [p for c in contents if isinstance(c, list) for p in c if isinstance(p, dict)]


def _listed(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]
