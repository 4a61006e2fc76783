"""One door to records of every format: JSONL, tables, webdataset shards, parquet, hub data sets, plain folders."""

from __future__ import annotations

import glob
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from mmllm.config import StrictModel
from mmllm.data.columns import check_columns, to_record
from mmllm.data.records import Located, finish_record, iter_lines
from mmllm.data.shards import folder_rows, row_columns, shard_rows
from mmllm.data.tables import table_rows
from mmllm.errors import UserError, unknown

if TYPE_CHECKING:
    from mmllm.data.rejected import Rejected

Format = Literal["jsonl", "table", "shards", "parquet", "hub", "folder"]
SUFFIXES: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".csv": "table",
    ".tsv": "table",
    ".tar": "shards",
    ".tgz": "shards",
    ".tar.gz": "shards",
    ".parquet": "parquet",
}


class DataSpec(StrictModel):
    """Where records come from.

    Attributes:
        path: a file, several as ``shard-{000..031}.tar``, ``*.tar`` or ``a.tar::b.tar``; a folder (its shards, its
            parquet files, or its media with the texts beside them); or ``hub:OWNER/NAME``.
        format: None goes by the ending.
        columns: record field -> column, list of columns, or ``{language: column}``; see ``to_record``.
        split, name: part and configuration of a hub data set.
        streaming: read a hub data set or parquet as it comes, without the memory-mapped copy that ``datasets`` makes.
        limit: the first so many records.
    """

    path: str
    format: Format | None = None
    columns: dict[str, str | list[str] | dict[str, str]] = Field(default_factory=dict)
    split: str = "train"
    name: str | None = None
    streaming: bool = False
    limit: int | None = Field(default=None, ge=1)


def open_records(
    source: str | Path | dict[str, Any] | DataSpec,
    columns: dict[str, Any] | None = None,
    root: str | Path | None = None,
    rejected: Rejected | None = None,
) -> Iterator[dict[str, Any]]:
    """Records one after the other, in the form that ``read_records`` gives; media stay encoded.

    A medium is an absolute path, bytes, or a ``Blob`` that reads its bytes when asked (``media_file`` opens all three).

    Args:
        source: see ``DataSpec``; text means its ``path``.
        columns: wins over the spec's.
        root: what relative paths are relative to; None: the current folder.
        rejected: takes what is no record (a broken line, a cut shard); None raises instead.

    Raises:
        UserError: nothing there, an unknown column, or, without ``rejected``, something that is no record.
    """
    spec = as_spec(source, columns)
    for item in located_records(spec, None, root):
        if item.record is not None:
            yield item.record
        elif rejected is not None:
            rejected.add(spec.path, item.where, item.where, str(item.problem))
        else:
            raise UserError(str(item.problem), item.where)


def located_records(
    source: str | Path | dict[str, Any] | DataSpec,
    columns: dict[str, Any] | None = None,
    root: str | Path | None = None,
) -> Iterator[Located]:
    """As ``open_records``, with the place of each record, and with what is wrong where there is none."""
    spec = as_spec(source, columns)
    found = itertools.chain.from_iterable(_read(spec, file) for file in expand(spec, root))
    for item in itertools.islice(found, spec.limit):
        if item.record is not None:
            raw = item.record
            item.id = None if raw.get("id") is None else str(raw["id"])
            try:
                item.record = finish_record(raw, item.file, item.place)
            except UserError as e:
                item.record, item.problem = None, f"{e.what}; {e.do}" if e.do else e.what
            except (TypeError, AttributeError, KeyError) as e:
                item.record, item.problem = None, f"unknown form of record ({e})"
        yield item


def as_spec(source: str | Path | dict[str, Any] | DataSpec, columns: dict[str, Any] | None = None) -> DataSpec:
    """A source in any of its forms as a spec with a format."""
    from mmllm.config import parse_config

    if isinstance(source, str | Path):
        source = {"path": str(source)}
    spec = source.model_copy() if isinstance(source, DataSpec) else parse_config(source, DataSpec, "data")
    if columns is not None:
        spec.columns = columns
    check_columns(spec.columns, None, spec.path)
    return spec


def expand(spec: DataSpec, root: str | Path | None = None) -> list[tuple[Format, Path | str]]:
    """(format, file) for every file that a spec's path means, in order.

    Raises:
        UserError: a pattern that fits no file, an unknown ending.
    """
    if spec.path.startswith("hub:") or spec.format == "hub":
        return [("hub", spec.path)]
    base = Path(root) if root is not None else Path()
    files: list[tuple[Format, Path | str]] = []
    for pattern in (p for part in spec.path.split("::") for p in braces(part)):
        path = base / pattern
        if "://" in pattern:
            raise UserError("shards and tables are read from this machine", pattern, "copy them here first")
        if any(c in pattern for c in "*?[") and not path.exists():
            found = sorted(Path(p) for p in glob.glob(str(path), recursive=True))
            if not found:
                raise UserError("no file fits this pattern", path)
        elif path.is_dir() and spec.format != "folder":
            found = sorted(path.glob("*.tar")) or sorted(path.glob("*.parquet")) or [path]
        else:
            found = [path]
        files.extend((spec.format or _format(p), p) for p in found)
    return files


def _format(path: Path) -> Format:
    """By the ending, or folder."""
    if path.is_dir():
        return "folder"
    for suffix, kind in SUFFIXES.items():
        if path.name.lower().endswith(suffix):
            return kind
    if not path.exists():
        raise UserError("no such records file", path)
    raise unknown("kind of records file", path.suffix, SUFFIXES, path)


def braces(pattern: str) -> list[str]:
    """``a{00..02}`` and ``a{x,y}`` as a shell expands them, left to right."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if span is not None:
        first, last = int(span[1]), int(span[2])
        width = max(len(s) for s in span.groups()) if any(s[0] == "0" and s != "0" for s in span.groups()) else 0
        steps = range(first, last + 1) if first <= last else range(first, last - 1, -1)
        choices = [str(n).zfill(width) for n in steps]
    else:
        choices = match[1].split(",")
        if len(choices) == 1:
            raise UserError(f"braces hold neither a list nor a range: '{{{match[1]}}}'", pattern, "write {000..031}")
    return [e for c in choices for e in braces(pattern[: match.start()] + c + pattern[match.end() :])]


def _read(spec: DataSpec, file: tuple[Format, Path | str]) -> Iterator[Located]:
    """Rows of one file as they stand, with the checks of the column map that its header allows."""
    kind, path = file
    if kind in ("parquet", "hub"):
        from mmllm.data.hub import dataset_rows

        names, rows = dataset_rows(path, spec.split, spec.name, spec.streaming)
        check_columns(spec.columns, names, path)
        yield from _mapped(rows, spec)
        return
    path = Path(path)
    if kind == "jsonl":
        rows = iter_lines(path)
        yield from _mapped(rows, spec) if spec.columns else rows
    elif kind == "table":
        checked = False
        for item in table_rows(path):
            if item.record is not None and not checked:
                check_columns(spec.columns, item.record, path)
                checked = True
            yield from _mapped([item], spec)
    else:
        yield from _mapped(shard_rows(path) if kind == "shards" else folder_rows(path), spec, shard=True)


def _mapped(rows: Any, spec: DataSpec, shard: bool = False) -> Iterator[Located]:
    for item in rows:
        if item.record is not None:
            own = row_columns(item.record) if shard else {}
            try:
                item.record = to_record(item.record, {**own, **spec.columns})
            except UserError as e:
                item.record, item.problem = None, e.what
        yield item
