"""Looks at every record of a file and says what is wrong, with file and line, before a training run meets it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmllm.data.media import load_audio, open_image
from mmllm.data.records import from_conversations, with_absolute_paths
from mmllm.errors import UserError

ROLES = ("system", "user", "assistant", "tool")


def check_file(file: Path, limit: int | None = None) -> tuple[int, list[str]]:
    """Checks a JSONL file (records of either form, or LLaVA / ShareGPT conversations).

    Each medium is decoded once, however many records use it.

    Returns:
        the number of records seen, and one line "file:line: what is wrong" for every problem.

    Raises:
        UserError: the file is missing or no text.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as e:
        raise UserError(f"cannot be read ({e.strerror})", file) from None
    except UnicodeDecodeError:
        raise UserError("not a text file", file, "give a JSONL file") from None
    problems: list[str] = []
    seen_ids: dict[str, int] = {}
    media: dict[tuple[str, str], str | None] = {}
    records = 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if limit is not None and records >= limit:
            break
        records += 1
        where = f"{file}:{number}"
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError("a record is a JSON object")
        except ValueError as e:
            problems.append(f"{where}: not valid JSON ({e})")
            continue
        name = record.get("id")
        if name is not None:
            if str(name) in seen_ids:
                problems.append(f"{where}: id '{name}' is already on line {seen_ids[str(name)]}")
            seen_ids.setdefault(str(name), number)
        try:
            if "conversations" in record:
                record = from_conversations(record, where)
            record = with_absolute_paths(record, file.parent.absolute())
        except (UserError, TypeError, AttributeError, KeyError) as e:
            problems.append(str(e) if isinstance(e, UserError) else f"{where}: unknown form of record ({e})")
            continue
        problems += [f"{where}: {p}" for p in check_record(record, media)]
    if records == 0:
        problems.append(f"{file}: no records")
    return records, problems


def check_record(record: dict[str, Any], media: dict[tuple[str, str], str | None] | None = None) -> Iterator[str]:
    """The problems of one record with absolute media paths.

    Args:
        media: (kind, path) -> problem or None, to decode each file once over many records.
    """
    media = {} if media is None else media
    if not any(k in record for k in ("image", "audio", "video", "text", "messages")):
        yield "nothing in it (no image, audio, video, text or messages)"
    for kind in ("image", "audio"):
        for path in _listed(record.get(kind)):
            yield from _medium(kind, path, media)
    if "text" in record:
        texts = record["text"]
        flat = list(texts.values()) if isinstance(texts, dict) else _listed(texts)
        flat = [t for x in flat for t in _listed(x)]
        if not flat or any(not isinstance(t, str) or not t.strip() for t in flat):
            yield "empty text"
    yield from _boxes(record.get("boxes"))
    if "messages" in record:
        threads = [record["messages"], *record.get("branches", [])]
        for thread in threads:
            yield from _messages(thread, media)
        if not any(isinstance(m, dict) and m.get("role") == "assistant" for t in threads for m in _listed(t)):
            yield "no answer in it (no message of role assistant)"


def _listed(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


def _boxes(boxes: Any) -> Iterator[str]:
    for box in _listed(boxes):
        xyxy = box.get("xyxy") if isinstance(box, dict) else None
        if not isinstance(xyxy, list) or len(xyxy) != 4 or not all(isinstance(v, int | float) for v in xyxy):
            yield f"a box needs xyxy with four numbers, not {box!r:.80}"
        elif not (0 <= xyxy[0] < xyxy[2] <= 1 and 0 <= xyxy[1] < xyxy[3] <= 1):
            yield f"box {xyxy} is empty or outside 0..1"
        elif not str(box.get("text", "")).strip():
            yield f"box {xyxy} has no text"


def _messages(messages: Any, media: dict[tuple[str, str], str | None]) -> Iterator[str]:
    if not isinstance(messages, list) or not messages:
        yield "messages must be a list that is not empty"
        return
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            yield f"a message needs a role out of {', '.join(ROLES)}: {message!r:.80}"
            continue
        content = message.get("content")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, list) or not parts:
            yield f"empty message of role {message['role']}"
            continue
        for part in parts:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind == "text":
                if not str(part.get("text") or "").strip():
                    yield f"empty text in a message of role {message['role']}"
            elif kind in ("image", "audio", "video"):
                path = part.get("path") or part.get(kind) or part.get("url")
                if not path:
                    yield f"{kind} without a path"
                elif kind != "video":
                    yield from _medium(kind, path, media)
            else:
                yield f"unknown part of a message: {part!r:.80}"


def _medium(kind: str, path: Any, media: dict[tuple[str, str], str | None]) -> Iterator[str]:
    """The problem of one picture or sound, decoding it the first time only; URLs are not fetched."""
    if not isinstance(path, str):
        yield f"{kind}: a path is a text, not {path!r:.60}"
        return
    if "://" in path or path.startswith("data:"):
        return
    if (kind, path) not in media:
        try:
            open_image(path) if kind == "image" else load_audio(path)
            media[kind, path] = None
        except UserError as e:
            media[kind, path] = str(e)
    problem = media[kind, path]
    if problem:
        yield problem
