"""Reads the files of benchmarks: folders under their usual names, JSON of both kinds, tables."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmllm.errors import UserError


def find_root(data: Path, names: Sequence[str]) -> Path:
    """The first of the named folders in ``data``, in any case; ``data`` itself when there is none.

    Raises:
        UserError: no such data folder.
    """
    if not data.is_dir():
        raise UserError("no such data folder", data, "give --data the folder that holds the benchmarks")
    below = {p.name.lower(): p for p in data.iterdir() if p.is_dir()}
    return next((below[n.lower()] for n in names if n.lower() in below), data)


def read_json(path: Path) -> Any:
    """Contents of a JSON file, or the list of the lines of a JSON-lines file (POPE calls one of those ``.json``).

    Raises:
        UserError: neither.
    """
    text = path.read_text(encoding="utf-8-sig")
    try:
        return json.loads(text)
    except json.JSONDecodeError as e:
        try:
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        except json.JSONDecodeError:
            raise UserError(f"not valid JSON ({e.msg})", f"{path}:{e.lineno}") from None


def read_table(path: Path, *columns: str, delimiter: str = ",") -> list[dict[str, str]]:
    """The rows of a CSV or TSV file.

    Raises:
        UserError: a column is not there.
    """
    csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8-sig", newline="") as f:
        reader = csv.DictReader(f, delimiter=delimiter)
        lacking = [c for c in columns if c not in (reader.fieldnames or [])]
        if lacking:
            raise UserError(f"no column '{lacking[0]}'", path, f"it has {', '.join(reader.fieldnames or []) or 'none'}")
        return list(reader)


def field(record: dict[str, Any], name: str, where: object) -> Any:
    """A record's field.

    Raises:
        UserError: it has none of this name.
    """
    if name not in record:
        has = ", ".join(map(str, list(record)[:8])) or "nothing"
        raise UserError(f"a record has no '{name}'", where, f"it has {has}")
    return record[name]


def read_parquet(path: Path) -> list[dict[str, Any]]:
    """The rows of a parquet file; pictures are ``{"bytes", "path"}``.

    Raises:
        UserError: pyarrow is not installed, or not a parquet file.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError("parquet files need pyarrow", path, "pip install 'mmllm[data]'") from None
    try:
        return parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowInvalid, OSError) as e:
        raise UserError(f"not a parquet file ({str(e).splitlines()[0]})", path) from None
