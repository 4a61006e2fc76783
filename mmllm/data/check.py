"""Looks at every record of a file and says what is wrong, with file and line, before a training run meets it."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmllm.data.blob import Blob
from mmllm.data.captions import captions_of
from mmllm.data.columns import FIELDS
from mmllm.data.interleaved import DOCUMENT
from mmllm.data.media import load_audio, open_image
from mmllm.data.open import DataSpec, located_records
from mmllm.data.questions import BOX_SCALE
from mmllm.data.records import MEDIA_FIELDS, Located
from mmllm.errors import UserError, unknown

BOX = re.compile(r"<box>([^<]*)</box>")
ROLES = ("system", "user", "assistant", "tool", DOCUMENT)


@dataclass
class TextLimit:
    """The longest text that is taken.

    Attributes:
        limit: in ``unit``.
        count: text -> its length; never more than a byte's worth a unit, beside four special tokens.
    """

    limit: int
    count: Callable[[str], int]
    unit: str = "tokens"

    def problem(self, text: str) -> str | None:
        """What is wrong with a text that is too long, else None."""
        if len(text.encode()) + 4 <= self.limit or (length := self.count(text)) <= self.limit:
            return None
        return f"text of {length} {self.unit} is longer than {self.limit}: {text!r:.40}"


def words_limit(limit: int) -> TextLimit:
    """A limit in words between spaces: a text that is too long in words is too long in any tokenizer's tokens."""
    return TextLimit(limit, lambda text: len(text.split()), "words")


def check_file(
    file: str | Path | DataSpec,
    limit: int | None = None,
    needs: Collection[str] = (),
    text_limit: TextLimit | None = None,
    columns: dict[str, Any] | None = None,
    root: str | Path | None = None,
) -> tuple[int, list[str]]:
    """Checks a file of records in any format that ``open_records`` reads.

    Each medium that is a file is decoded once, however many records use it.

    Args:
        needs: fields that every record must have, such as ``image`` and ``text``.
        columns, root: see ``open_records``.

    Returns:
        the number of records seen, and one line "file:line: what is wrong" for every problem.

    Raises:
        UserError: the file is missing or of no known kind.
    """
    for field in needs:
        if field not in FIELDS:
            raise unknown("record field", field, FIELDS, "needs")
    problems: list[str] = []
    seen: dict[tuple[str, str], int | str] = {}
    media: dict[tuple[str, str], str | None] = {}
    records = 0
    for item in located_records(file, columns, root):
        if limit is not None and records >= limit:
            break
        records += 1
        if item.record is None:
            problems.append(f"{item.where}: {item.problem}")
            continue
        twice = repeated_id(item, seen)
        problems += [f"{item.where}: {p}" for p in ([twice] if twice else [])]
        problems += [f"{item.where}: {p}" for p in check_record(item.record, media, needs, text_limit)]
    if records == 0:
        problems.append(f"{file.path if isinstance(file, DataSpec) else file}: no records")
    return records, problems


def repeated_id(item: Located, seen: dict[tuple[str, str], int | str]) -> str | None:
    """What is wrong with a record whose id another one of its file has; ``seen`` keeps (file, id) -> place."""
    assert item.record is not None
    key = (item.file, str(item.record["id"]))
    if key not in seen:
        seen[key] = item.place
        return None
    return f"id '{key[1]}' is already {f'on line {seen[key]}' if isinstance(seen[key], int) else f'at {seen[key]}'}"


def check_record(
    record: dict[str, Any],
    media: dict[tuple[str, str], str | None] | None = None,
    needs: Collection[str] = (),
    text_limit: TextLimit | None = None,
) -> Iterator[str]:
    """The problems of one record with absolute media paths.

    Args:
        media: (kind, path) -> problem or None, to decode each file once over many records.
        needs, text_limit: see ``check_file``.
    """
    media = {} if media is None else media
    if not any(k in record for k in (*MEDIA_FIELDS, "text", "messages")):
        yield "nothing in it (no image, audio, video, text or messages)"
    else:
        yield from missing_fields(record, needs)
    for kind in MEDIA_FIELDS:
        for path in _listed(record.get(kind)):
            yield from _medium(kind, path, media)
    if "text" in record:
        texts = [t for _, t in captions_of(record)]
        if not texts or any(not isinstance(t, str) or not t.strip() for t in texts):
            yield "empty text"
        yield from (p for t in texts if text_limit and isinstance(t, str) and (p := text_limit.problem(t)))
    yield from box_problems(record.get("boxes"))
    if "messages" in record:
        threads = [record["messages"], *record.get("branches", [])]
        for thread in threads:
            yield from thread_problems(thread, lambda kind, path: _medium(kind, path, media))
        answers = ("assistant", DOCUMENT)
        if not any(isinstance(m, dict) and m.get("role") in answers for t in threads for m in _listed(t)):
            yield "no answer in it (no message of role assistant)"


def missing_fields(record: dict[str, Any], needs: Collection[str]) -> Iterator[str]:
    """One line for every needed field that a record lacks; a label serves as text."""
    for field in needs:
        held = record.get(field)
        if field == "text" and held in (None, [], {}):
            held = record.get("label")
        if held is None or held == [] or held == {}:
            yield f"no {field}, which is needed"


def _listed(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


def box_problems(boxes: Any) -> Iterator[str]:
    """The problems of a record's ``boxes``: each needs ``xyxy`` within 0..1 with an area, and a text."""
    for box in _listed(boxes):
        xyxy = box.get("xyxy") if isinstance(box, dict) else None
        if not isinstance(xyxy, list) or len(xyxy) != 4 or not all(isinstance(v, int | float) for v in xyxy):
            yield f"a box needs xyxy with four numbers, not {box!r:.80}"
        elif not (0 <= xyxy[0] < xyxy[2] <= 1 and 0 <= xyxy[1] < xyxy[3] <= 1):
            yield f"box {xyxy} is empty or outside 0..1"
        elif not str(box.get("text", "")).strip():
            yield f"box {xyxy} has no text"


def box_problem(text: str) -> str | None:
    """What is wrong with the first bad ``<box>x0,y0,x1,y1</box>`` of a text; marks without any digit are only text."""
    for inside in BOX.findall(text):
        numbers = re.fullmatch(r"\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*", inside)
        if numbers is None:
            if re.search(r"\d", inside):
                return f"box <box>{inside[:40]}</box> is not four whole numbers"
            continue
        x0, y0, x1, y1 = map(int, numbers.groups())
        if x0 > x1 or y0 > y1 or max(x1, y1) > BOX_SCALE:
            return f"box <box>{inside}</box> is turned round or outside 0..{BOX_SCALE}"
    return None


def thread_problems(messages: Any, medium: Callable[[str, Any], Iterable[str]]) -> Iterator[str]:
    """The problems of a list of messages.

    Args:
        medium: kind and path of a picture or sound -> its problems.
    """
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
                text = part.get("text")
                if not str(text or "").strip():
                    yield f"empty text in a message of role {message['role']}"
                elif (problem := box_problem(str(text))) is not None:
                    yield problem
            elif kind in ("image", "audio", "video"):
                path = part.get("path") or part.get(kind) or part.get("url")
                if not path:
                    yield f"{kind} without a path"
                elif kind != "video":
                    yield from medium(kind, path)
            else:
                yield f"unknown part of a message: {part!r:.80}"


def _medium(kind: str, path: Any, media: dict[tuple[str, str], str | None]) -> Iterator[str]:
    """The problem of one medium, decoding a file the first time only; URLs are not fetched, videos not decoded."""
    if not isinstance(path, str | bytes | Blob):
        yield f"{kind}: a path is a text, not {path!r:.60}"
        return
    if isinstance(path, str) and ("://" in path or path.startswith("data:")):
        return
    problem = media.get((kind, path)) if isinstance(path, str) else None
    if not isinstance(path, str) or (kind, path) not in media:
        problem = _decoded(kind, path)
        if isinstance(path, str):
            media[kind, path] = problem
    if problem:
        yield problem


def _decoded(kind: str, path: str | bytes | Blob) -> str | None:
    """What a decoder says against a medium."""
    try:
        if kind == "video":
            if isinstance(path, str) and not (Path(path).is_file() and Path(path).stat().st_size):
                return f"{path}: no such video, or an empty one"
        else:
            open_image(path) if kind == "image" else load_audio(path)
    except UserError as e:
        return str(e)
    return None
