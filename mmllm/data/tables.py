"""CSV and TSV files as rows, with the line of each."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from mmllm.data.records import Located
from mmllm.errors import UserError

MAX_CELL = 10_000_000  # characters


def table_rows(path: Path) -> Iterator[Located]:
    """Rows under the names of the header line; the separator is the tab, comma or semicolon that the header holds.

    Raises:
        UserError: missing file, no text in UTF-8, no header, or a column name given twice.
    """
    csv.field_size_limit(MAX_CELL)
    try:
        with path.open(encoding="utf-8-sig", newline="") as f:
            first = f.readline()
            header, separator = table_header(first, path)
            rows = csv.reader(f, delimiter=separator)
            line = 1  # a quoted cell may go over several lines: the row's place is its first
            while True:
                start = line + 1
                try:
                    row = next(rows, None)
                except csv.Error as e:
                    yield Located(str(path), start, problem=f"not a row of a table ({e})")
                    line = rows.line_num + 1
                    continue
                line = rows.line_num + 1
                if row is None:
                    return
                if len(row) == len(header):
                    yield Located(str(path), start, dict(zip(header, row)))
                elif row:
                    yield Located(str(path), start, problem=f"{len(row)} cells under {len(header)} columns")
    except FileNotFoundError:
        raise UserError("no such records file", path) from None
    except UnicodeDecodeError:
        raise UserError("not a text file in UTF-8", path, "save the table as UTF-8") from None


def table_header(line: str, path: Path) -> tuple[list[str], str]:
    """(column names, separator) from a table's first line."""
    separator = "\t" if path.suffix.lower() == ".tsv" else max("\t,;", key=line.count)
    names = [n.strip() for n in next(csv.reader([line.rstrip("\r\n")], delimiter=separator), [])]
    if not any(names):
        raise UserError("no header line", path, "name the columns in the first line")
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise UserError(f"two columns are called '{twice[0]}'", path, "give each column its own name")
    return names, separator
