"""Parquet files and hub data sets through the ``datasets`` library, media left as bytes."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmllm.data.blob import CellBlob
from mmllm.data.records import Located
from mmllm.errors import UserError

HUB = "hub:"


def dataset_rows(source: str | Path, split: str = "train", name: str | None = None, streaming: bool = False) -> Any:
    """(column names where they are known, iterator over rows) of a parquet file, or of ``hub:OWNER/NAME``.

    With ``streaming`` rows come one after the other and hold their media as bytes; without it the data set is made
    once in the cache of ``datasets``, memory-mapped, and media are read when they are wanted.

    Args:
        split: of a hub data set.
        name: a hub data set's configuration.

    Raises:
        UserError: ``datasets`` is not installed, or there is no such data set.
    """
    datasets = _library(source)
    try:
        if isinstance(source, Path):
            found: Any = datasets.load_dataset("parquet", data_files=[str(source)], split="train", streaming=streaming)
        else:
            found = datasets.load_dataset(source.removeprefix(HUB), name, split=split, streaming=streaming)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as e:
        raise _unreadable(source, e) from None
    single: list[str] = []  # columns of one medium a cell
    for column, feature in (found.features or {}).items():
        inner: Any = getattr(feature, "feature", None)
        if isinstance(feature, datasets.Image | datasets.Audio):
            found = found.cast_column(column, type(feature)(decode=False))
            single.append(column)
        elif isinstance(feature, dict) and set(feature) == {"bytes", "path"}:
            single.append(column)
        elif isinstance(inner, datasets.Image | datasets.Audio):
            found = found.cast_column(column, datasets.List(inner.__class__(decode=False)))
    rows = _streamed(found, str(source)) if streaming else _mapped(found, single, str(source))
    return found.column_names, rows


def _library(source: object) -> Any:
    try:
        return importlib.import_module("datasets")
    except ImportError:
        do = 'pip install "mmllm[data]"'
        raise UserError("parquet and hub data sets are read with the library 'datasets'", source, do) from None


def _unreadable(source: object, error: Exception) -> UserError:
    cause = error.__cause__ or error
    return UserError(f"cannot be read ({str(cause).splitlines()[0] if str(cause) else cause!r})", source)


def _media(value: Any) -> Any:
    """``{"bytes", "path"}``, or a list of them, as bytes (the path where there are none); other values as they are."""
    if isinstance(value, list):
        return [_media(v) for v in value]
    if isinstance(value, dict) and set(value) == {"bytes", "path"}:
        return value["bytes"] or value["path"]
    return value


def _streamed(found: Any, source: str) -> Iterator[Located]:
    rows = iter(found)
    for number in itertools.count(1):
        try:
            row = next(rows, None)
        except (OSError, ValueError, _library(source).exceptions.DatasetsError) as e:
            raise _unreadable(f"{source}:{number}", e) from None
        if row is None:
            return
        yield Located(source, number, {k: _media(v) for k, v in row.items()})


def _mapped(found: Any, single: list[str], source: str) -> Iterator[Located]:
    plain = found.remove_columns(single)
    columns = {c: found.select_columns([c]) for c in single}
    present = {c: _present(columns[c], c) for c in single}
    for index in range(len(found)):
        row = {k: _media(v) for k, v in plain[index].items()} if plain.column_names else {}
        for column in single:
            if present[column][index]:
                row[column] = CellBlob(columns[column], index, column, f"{source}:{index + 1}:{column}")
        yield Located(source, index + 1, row)


def _present(rows: Any, column: str) -> list[bool]:
    """Which cells hold something, without reading what they hold."""
    cells = rows.with_format("arrow")[:].column(column)
    return [bool(v) for chunk in cells.chunks for v in chunk.is_valid().to_pylist()]
