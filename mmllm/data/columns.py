"""From the columns of a table, the keys of a shard or the fields of a dataset to the one form of records."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mmllm.data.blob import Blob
from mmllm.data.box_forms import box_fields
from mmllm.data.interleaved import interleaved_fields
from mmllm.data.records import MEDIA_FIELDS
from mmllm.errors import UserError, unknown

FIELDS = (*MEDIA_FIELDS, "text", "id", "label", "group", "boxes", "messages", "conversations", "meta")
# field -> its column, its columns (a list of texts or media), or language -> column
Columns = dict[str, str | list[str] | dict[str, str]]


def column_options(options: Iterable[str]) -> dict[str, Any]:
    """``FIELD=COLUMN`` and ``FIELD=COLUMN,COLUMN`` as a column map.

    Raises:
        UserError: an option of another form.
    """
    columns: dict[str, Any] = {}
    for option in options:
        field, equals, value = option.partition("=")
        if not (field and equals and value):
            raise UserError(f"'{option}' is not FIELD=COLUMN", do="write e.g. image=filepath")
        columns[field] = value.split(",") if "," in value else value
    return columns


def check_columns(columns: Columns, available: Iterable[str] | None, where: object) -> None:
    """Checks a column map before anything is read.

    Args:
        available: the columns that there are; None where only the rows tell.

    Raises:
        UserError: a field that records don't have, or a column that is not there.
    """
    for field in columns:
        if field not in FIELDS:
            raise unknown("record field", field, FIELDS, where)
    if available is not None:
        known = list(available)
        for name in _names(columns):
            if name not in known:
                raise unknown("column", name, known, where)


def _names(columns: Columns) -> list[str]:
    """All columns that a map names."""
    found: list[str] = []
    for value in columns.values():
        found += [value] if isinstance(value, str) else list(value.values() if isinstance(value, dict) else value)
    return found


def to_record(row: dict[str, Any], columns: Columns | None = None) -> dict[str, Any]:
    """A row as a record.

    Columns that the map names become its fields; others keep their name where records have such a field, and go into
    ``meta`` where they don't. Empty cells (None, "") are left out, as is a field of which all cells are empty.

    Raises:
        UserError: ``meta`` is a cell and no mapping.
    """
    columns = columns or {}
    used = set(_names(columns))
    record: dict[str, Any] = {}
    for field, source in columns.items():
        if isinstance(source, str):
            value = row.get(source)
        elif isinstance(source, dict):
            value = {k: row[c] for k, c in source.items() if not _empty(row.get(c))}
        else:
            value = [row[c] for c in source if not _empty(row.get(c))]
        if not _empty(value):
            record[field] = value
    meta = record.pop("meta", {})
    if not isinstance(meta, dict):
        raise UserError(f"meta must be a mapping, not {meta!r:.40}")
    rest: dict[str, Any] = {}
    kept = {*FIELDS, *interleaved_fields(row), *box_fields(row)}
    if "messages" in row or "conversations" in row:
        kept |= {f"{field}s" for field in MEDIA_FIELDS}
    for name, value in row.items():
        if name in used or name in columns or _empty(value):
            continue
        if name == "meta" and isinstance(value, dict):
            meta = {**value, **meta}
        elif name in kept:
            record[name] = value
        elif not isinstance(value, bytes | Blob):  # media that nobody asked for
            rest[name] = value
    if rest or meta:
        record["meta"] = {**rest, **meta}
    return record


def _empty(value: Any) -> bool:
    return value is None or (isinstance(value, str | list | dict) and not value)
