"""Webdataset shards and plain folders: files that share a name up to the first dot make one row.

Plain ``tarfile`` serves here better than the webdataset library: it tells where in the shard each file lies, so that a
batch chosen by number reads just its own bytes, in any order, and a resumed run needs no stream to catch up with.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mmllm.data.blob import ShardBlob
from mmllm.data.records import Located
from mmllm.errors import UserError

IMAGE, AUDIO = ("jpg", "png", "jpeg", "webp", "gif", "bmp"), ("flac", "wav", "ogg", "mp3", "opus")
VIDEO = ("mp4", "webm", "mkv", "mov", "avi")
# Record field -> the name endings (after the first dot) that serve as it, best first: open_clip's layout.
ENDINGS = {"image": IMAGE, "audio": AUDIO, "video": VIDEO, "text": ("txt",), "label": ("cls",)}
MEDIA_ENDINGS = frozenset(e for endings in ENDINGS.values() for e in endings)
NAME = re.compile(r"((?:.*/)?[^./][^/.]*)\.([^/]+)")


def shard_rows(path: Path) -> Iterator[Located]:
    """The rows of one tar: ``{"id": "SHARD/KEY", "jpg": blob, "txt": str, ...}`` with the fields of its json.

    Pictures and sounds of an uncompressed tar stay where they are until they are read; a compressed one is held in
    memory. See ``row_columns`` for what serves as which field of a record.

    Raises:
        UserError: missing, or no tar at all.
    """
    try:
        try:
            tar, lazy = tarfile.open(path, "r:"), True
        except tarfile.ReadError:
            tar, lazy = tarfile.open(path, "r:*"), False
    except FileNotFoundError:
        raise UserError("no such shard", path) from None
    except (tarfile.TarError, OSError, EOFError) as e:
        raise UserError(f"not a tar ({str(e).splitlines()[0] if str(e) else type(e).__name__})", path) from None
    with tar:
        yield from group_rows(str(path), path.stem.split(".")[0], _members(tar, path, lazy))


def folder_rows(path: Path) -> Iterator[Located]:
    """The rows of a folder's media and texts, subfolders included, in the order of their names.

    Raises:
        UserError: nothing in it.
    """
    files = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
    found = [p for p in files if p.suffix[1:].lower() in MEDIA_ENDINGS | {"json"}]
    if not any(p.suffix[1:].lower() in MEDIA_ENDINGS for p in found):
        raise UserError("no pictures, sounds, videos or texts in this folder", path)
    yield from group_rows(str(path), "", ((p.relative_to(path).as_posix(), p) for p in found))


def row_columns(row: dict[str, Any]) -> dict[str, str]:
    """The column map that a shard's row has by itself: the first known ending that is there for each field."""
    found = {field: next((e for e in endings if e in row), None) for field, endings in ENDINGS.items()}
    return {field: ending for field, ending in found.items() if ending is not None}


def _members(tar: tarfile.TarFile, path: Path, lazy: bool) -> Iterator[tuple[str, Any]]:
    """(name, blob or bytes) of every file; the last pair of a broken tar is (name before, the error)."""
    name = ""
    try:
        for member in tar:
            if not member.isreg():
                continue
            name = member.name.removeprefix("./")
            if lazy and not member.issparse():
                yield name, ShardBlob(str(path), member.offset_data, member.size, f"{path}:{name}")
            else:
                file = tar.extractfile(member)
                yield name, file.read() if file is not None else b""
    except (tarfile.TarError, OSError, EOFError) as e:
        yield name, UserError(f"the shard is broken after {name or 'its start'} ({e})", path, "copy it again")


def group_rows(file: str, prefix: str, members: Iterable[tuple[str, Any]]) -> Iterator[Located]:
    """Consecutive files of one key as one row; a second file of the same name begins another row, as in open_clip.

    Args:
        prefix: the shard's name, put before keys: shards often number their items from 0 again.
        members: (name, media or bytes).
    """
    key, row = None, Located(file, "")
    for name, value in members:
        if isinstance(value, UserError):
            if row.record or row.problem:
                yield row
            yield Located(file, name or "start", problem=value.what)
            return
        match = NAME.fullmatch(name)
        if match is None:
            continue
        ending = match[2].lower()
        if match[1] != key or ending in (row.record or {}):
            if row.record or row.problem:
                yield row
            key = match[1]
            row = Located(file, key, {"id": f"{prefix}/{key}" if prefix else key})
        if row.record is not None:
            _add(row, ending, value)
    if row.record or row.problem:
        yield row


def _add(row: Located, ending: str, value: Any) -> None:
    """Puts one file into the row; what can't be read as text or JSON makes the row a problem."""
    record = row.record
    assert record is not None
    try:
        if ending.split(".")[-1] in ("txt", "cls"):
            record[ending] = _bytes(value).decode("utf-8").strip()
        elif ending == "json":
            data = json.loads(_bytes(value))
            if not isinstance(data, dict):
                raise ValueError("no object")
            own_id = {"id": str(data["id"])} if "id" in data else {}
            row.record = {**data, **record, **own_id}
        else:
            record[ending] = os.fspath(value) if isinstance(value, Path) else value
    except UnicodeDecodeError:
        row.record, row.problem = None, f"its {ending} is no text in UTF-8"
    except ValueError as e:
        row.record, row.problem = None, f"its json is not valid ({e})"


def _bytes(value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    return value.read_bytes() if isinstance(value, Path) else value.read()
