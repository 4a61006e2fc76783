"""Reads records: our JSONL, and LLaVA / ShareGPT files converted on the way in; media paths become absolute."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmllm.data.box_forms import with_boxes
from mmllm.data.chat_media_forms import MEDIA_FIELDS, PLACEHOLDER, with_media_parts
from mmllm.data.interleaved import from_interleaved, interleaved_fields
from mmllm.errors import UserError

ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}


@dataclass
class Located:
    """A record and where it stands, or what is wrong with what stands there.

    Attributes:
        file: the file that the record stands in.
        place: its line, or its name inside a shard.
        id: of what is no record, where it has one.
    """

    file: str
    place: int | str
    record: dict[str, Any] | None = None
    problem: str | None = None
    id: str | None = None

    @property
    def where(self) -> str:
        return f"{self.file}:{self.place}"


def iter_records(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, record as it stands) of a JSONL file, or (item number, record) of a JSON list.

    Raises:
        UserError: missing file, broken JSON or a line that is not an object, with file and line.
    """
    for item in iter_lines(path):
        if item.record is None:
            raise UserError(str(item.problem), item.where)
        yield int(item.place), item.record


def iter_lines(path: str | Path) -> Iterator[Located]:
    """Every line that is not empty (item of a JSON list); a broken line comes with its problem.

    Raises:
        UserError: missing file, no text, or broken JSON of a JSON list.
    """
    path = Path(path)
    try:
        if path.suffix == ".json":
            data = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(data, list):
                raise UserError("expected a JSON list of records", path)
            yield from (_located(path, number, item) for number, item in enumerate(data, 1))
            return
        with path.open(encoding="utf-8") as f:
            for number, line in enumerate(f, 1):
                if line.strip():
                    try:
                        yield _located(path, number, json.loads(line))
                    except json.JSONDecodeError as e:
                        yield Located(str(path), number, problem=f"not valid JSON ({e.msg})")
    except FileNotFoundError:
        raise UserError("no such records file", path) from None
    except IsADirectoryError:
        raise UserError("a folder, not a records file", path, "give the .jsonl file inside it") from None
    except json.JSONDecodeError as e:
        raise UserError(f"not valid JSON ({e.msg})", f"{path}:{e.lineno}") from None
    except UnicodeDecodeError:
        raise UserError("not a text file in UTF-8", path, "give a .jsonl file of records") from None


def _located(path: Path, number: int, record: Any) -> Located:
    if not isinstance(record, dict):
        return Located(str(path), number, problem="a record must be a JSON object")
    return Located(str(path), number, record)


def read_records(path: str | Path, limit: int | None = None) -> list[dict[str, Any]]:
    """All records, in our two forms (tuple or conversation), with absolute media paths.

    Raises:
        UserError: see ``iter_records``; also for a record of no known form.
    """
    path = Path(path)
    out = []
    for number, raw in iter_records(path):
        out.append(finish_record(raw, str(path), number))
        if limit is not None and len(out) >= limit:
            break
    return out


def finish_record(raw: dict[str, Any], file: str, place: int | str) -> dict[str, Any]:
    """The record with an id, in our form of conversation, with media paths absolute against the file's folder.

    Raises:
        UserError: see ``from_conversations``, ``from_interleaved``, ``with_media_parts`` and
            ``with_boxes``.
    """
    if "conversations" in raw:
        record = from_conversations(raw, f"{file}:{place}")
    elif "messages" not in raw and interleaved_fields(raw):
        record = from_interleaved(raw, f"{file}:{place}")
    else:
        record = with_media_parts(raw, f"{file}:{place}") if "messages" in raw else dict(raw)
    path = Path(file)
    if record.get("id") is None:
        record["id"] = f"{path.stem}-{place}"
    if isinstance(record.get("file_name"), str) and "bbox" in record:
        record.setdefault("image", record["file_name"])
    record = with_absolute_paths(record, (path if path.is_dir() else path.parent).absolute())
    return with_boxes(record, f"{file}:{place}")


def _absolute(value: Any, folder: Path) -> Any:
    if isinstance(value, list):
        return [_absolute(v, folder) for v in value]
    if isinstance(value, str) and "://" not in value and not value.startswith("data:"):
        return str(folder.joinpath(value))
    return value


def with_absolute_paths(record: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The record with every media path made absolute against ``folder``; URLs and data URIs stay as they are."""
    out = dict(record)
    for name in MEDIA_FIELDS:
        if name in out:
            out[name] = _absolute(out[name], folder)

    if isinstance(out.get("boxes"), list):
        out["boxes"] = [
            {**b, "mask": _absolute(b["mask"], folder)} if isinstance(b, dict) and "mask" in b else b
            for b in out["boxes"]
        ]

    def message(m: dict[str, Any]) -> dict[str, Any]:
        content = m.get("content")
        if not isinstance(content, list):
            return m
        parts = [
            {**p, "path": _absolute(p["path"], folder)} if isinstance(p, dict) and "path" in p else p for p in content
        ]
        return {**m, "content": parts}

    if "messages" in out:
        out["messages"] = [message(m) for m in out["messages"]]
    if "branches" in out:
        out["branches"] = [[message(m) for m in branch] for branch in out["branches"]]
    return out


def from_conversations(record: dict[str, Any], where: object = None) -> dict[str, Any]:
    """LLaVA / ShareGPT ``{"image", "conversations": [{"from", "value"}]}`` -> ``{"id", "messages"}``.

    ``<image>`` marks in the text become image parts in place; media without a mark come first.

    Raises:
        UserError: an unknown speaker, or a number of marks that does not fit the media.
    """
    media: dict[str, list[str]] = {}
    for kind in MEDIA_FIELDS:
        value = record.get(kind, record.get(f"{kind}s"))
        media[kind] = [value] if isinstance(value, str) else list(value or [])
    waiting = {k: list(v) for k, v in media.items()}
    messages = []
    for turn in record["conversations"]:
        speaker, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content", ""))
        if speaker not in ROLES:
            raise UserError(f"unknown speaker '{speaker}'", where, "use human and gpt")
        parts: list[dict[str, Any]] = []
        pieces = PLACEHOLDER.split(text)
        for i, piece in enumerate(pieces):
            if i % 2:
                if not waiting[piece]:
                    raise UserError(f"more <{piece}> marks than {piece}s", where)
                parts.append({"type": piece, "path": waiting[piece].pop(0)})
            elif piece:
                parts.append({"type": "text", "text": piece})
        messages.append({"role": ROLES[speaker], "content": parts})
    first = next((m for m in messages if m["role"] == "user"), None)
    for kind, left in waiting.items():
        if left and len(left) < len(media[kind]):
            raise UserError(f"fewer <{kind}> marks than {kind}s", where)
        if left and first is not None:
            first["content"][:0] = [{"type": kind, "path": p} for p in left]
    out = {"messages": messages}
    return {"id": str(record["id"]), **out} if "id" in record else out
