"""Media inside other files: a place in a shard or a cell of a table, whose bytes are read when a batch wants them."""

from __future__ import annotations

import hashlib
import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from mmllm.errors import UserError


class Blob:
    """One picture or sound that is not a file of its own.

    Attributes:
        name: what messages call it, such as ``shard-000.tar:000017.jpg``.
    """

    name: str

    def read(self) -> bytes:
        """The encoded bytes.

        Raises:
            UserError: what holds them is gone or has changed.
        """
        raise NotImplementedError

    def stamp(self) -> str:
        """What tells these bytes from others, without reading them; a key of the feature cache."""
        raise NotImplementedError


@dataclass(frozen=True)
class ShardBlob(Blob):
    """``size`` bytes at ``offset`` of an uncompressed tar."""

    path: str
    offset: int
    size: int
    name: str

    def read(self) -> bytes:
        try:
            with open(self.path, "rb") as f:
                f.seek(self.offset)
                data = f.read(self.size)
        except OSError as e:
            raise UserError(f"cannot be read ({e.strerror})", self.name) from None
        if len(data) < self.size:
            raise UserError("the shard is cut off", self.name, "copy it again")
        return data

    def stamp(self) -> str:
        return f"{file_stamp(self.path)} {self.offset} {self.size}"


@dataclass(frozen=True, eq=False)
class CellBlob(Blob):
    """A media cell of a memory-mapped ``datasets.Dataset`` whose column is not decoded: ``{"bytes", "path"}``."""

    rows: Any
    row: int
    column: str
    name: str

    def read(self) -> bytes:
        cell = self.rows[self.row][self.column]
        if cell["bytes"] is not None:
            return cell["bytes"]
        try:
            return Path(cell["path"]).read_bytes()
        except (OSError, TypeError) as e:
            why = getattr(e, "strerror", None) or "no bytes and no path"
            raise UserError(f"cannot be read ({why})", self.name) from None

    def stamp(self) -> str:
        return f"{self.rows._fingerprint} {self.row} {self.column}"


def media_file(value: Any) -> Path | BinaryIO:
    """What a decoder opens: the path, or the bytes of a blob as a file; open files stay as they are."""
    if isinstance(value, Blob):
        return io.BytesIO(value.read())
    if isinstance(value, bytes):
        return io.BytesIO(value)
    return Path(value) if isinstance(value, str) else value


def media_name(value: Any) -> str:
    """What messages call a medium."""
    if isinstance(value, Blob):
        return value.name
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    if isinstance(value, str | Path):
        return str(value)
    return str(getattr(value, "name", None) or f"<{type(value).__name__}>")


def file_stamp(path: str | Path) -> str:
    """Path with size and time, so that a changed file is another item.

    Raises:
        UserError: no such file.
    """
    try:
        info = os.stat(path)
    except OSError:
        raise UserError("no such file", path, "build the data again: mmllm data build") from None
    return f"{path} {info.st_size} {info.st_mtime_ns}"


def media_stamp(value: Any) -> str:
    """What tells a medium from others: see ``Blob.stamp`` and ``file_stamp``; bytes by their hash, lists by all parts.

    Raises:
        UserError: no such file.
    """
    if isinstance(value, Blob):
        return value.stamp()
    if isinstance(value, list | tuple):
        return " ".join(media_stamp(v) for v in value)
    return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else file_stamp(value)
