"""One form for everything that is measured: a list of figures, written as JSON beside the output people read."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from mmllm.errors import UserError


@dataclass
class Figure:
    """One measured number with what is needed to judge it; fields that do not apply stay None and are not written.

    Attributes:
        name: for instance ``pope_accuracy_seen``.
        value: accuracies and recalls as fractions of 1.
        better: "higher" or "lower".
        low, high: bounds of the 95 % interval.
        n: number of items that the value is made of.
        unit: such as "fraction", "s", "GB".
        control: the same figure with the media shuffled among the items.
        control_low, control_high: interval of the control.
        chance: what guessing gives.
        target: what the project wants to reach; verdict: "met", "missed" or a word of the command's own.
        arms: values of compared arms; seeds: the seeds that went in.
        note: one line a reader needs, such as the subset that a control was measured on.
        controls: all controls by name (shuffled, blind, always_yes), each with value, low, high, n.
    """

    name: str
    value: float | None
    better: str = "higher"
    low: float | None = None
    high: float | None = None
    n: int | None = None
    unit: str | None = None
    control: float | None = None
    control_low: float | None = None
    control_high: float | None = None
    chance: float | None = None
    target: float | None = None
    verdict: str | None = None
    arms: dict[str, Any] | None = None
    seeds: list[int] | None = None
    note: str | None = None
    controls: dict[str, dict[str, Any]] | None = None

    def __post_init__(self) -> None:
        if self.better not in ("higher", "lower"):
            raise ValueError(f"figure {self.name}: better must be 'higher' or 'lower', not {self.better!r}")
        for name in ("value", "low", "high", "control", "control_low", "control_high", "chance", "target"):
            number = getattr(self, name)
            if number is not None:
                number = float(number)
                # NaN and infinity are not JSON; a figure that could not be computed has no value.
                setattr(self, name, number if math.isfinite(number) else None)

    def to_dict(self) -> dict[str, Any]:
        """Only the fields that apply; ``value`` is always there, null when it could not be computed."""
        return {k: v for k, v in asdict(self).items() if v is not None or k == "value"}


def machine() -> dict[str, Any]:
    """What the numbers were measured on: processor, usable cores, memory, operating system, Python."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        cpu = next(
            (x.split(":", 1)[1].strip() for x in info.read_text().splitlines() if x.startswith("model name")), cpu
        )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    out: dict[str, Any] = {"cpu": cpu, "cores": cores, "system": platform.system(), "python": platform.python_version()}
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        out["memory_gb"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    return out


def write_figures(
    path: str | Path,
    command: str,
    seed: int | None,
    machine_info: dict[str, Any] | None,
    sources: Sequence[Any] | None,
    figures: Iterable[Figure],
    **extra: Any,
) -> Path:
    """Writes the figures atomically (whole file or none).

    Args:
        machine_info: from :func:`machine`, which is called when this is None.
        sources: the data sources that were used, as the dataset's manifest lists them.
        extra: further top-level entries, such as ``missing`` sources.

    Raises:
        ValueError: two figures of one name.
    """
    rows = [f.to_dict() for f in figures]
    seen: set[str] = set()
    for row in rows:
        if row["name"] in seen:
            raise ValueError(f"two figures are called {row['name']!r}")
        seen.add(row["name"])
    where = machine() if machine_info is None else machine_info
    data = {
        "command": command,
        "seed": seed,
        "machine": where,
        "sources": list(sources or []),
        **extra,
        "figures": rows,
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(part, path)
    return path


def read_figures(path: str | Path) -> list[Figure]:
    """The figures of a file that :func:`write_figures` wrote; keys of newer versions are ignored.

    Raises:
        UserError: missing file, not JSON, or no figures in it.
    """
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))["figures"]
    except FileNotFoundError:
        raise UserError("no such results file", path) from None
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError):
        raise UserError("not a results file (JSON with a list 'figures')", path) from None
    known = {f.name for f in fields(Figure)}
    return [Figure(**{k: v for k, v in row.items() if k in known}) for row in rows]


def number(value: float | None, unit: str | None = "fraction") -> str:
    """A number as people read it: fractions in percent, others with three digits."""
    if value is None:
        return ""
    if unit in (None, "fraction"):
        return f"{100 * value:.1f} %"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


COLUMNS = ("figure", "value", "95 % interval", "shuffled", "chance", "target", "n", "")


def table_rows(figures: Iterable[Figure]) -> list[tuple[str, ...]]:
    """One row of strings per figure, for the terminal and the page alike; columns as in ``COLUMNS``."""
    rows = []
    for f in figures:
        unit = f"\u00a0{f.unit}" if f.unit and f.unit != "fraction" and f.value is not None else ""
        interval = "" if f.low is None or f.high is None else f"{number(f.low, f.unit)} … {number(f.high, f.unit)}"
        cells = (number(f.value, f.unit) + unit if f.value is not None else "not computed", interval)
        cells += tuple(number(x, f.unit) for x in (f.control, f.chance, f.target))
        rows.append((f.name, *cells, "" if f.n is None else str(f.n), f.verdict or ""))
    return rows


def print_figures(figures: Iterable[Figure], title: str | None = None) -> None:
    """The figures as a table in the terminal (tab-separated lines when the output is no terminal)."""
    print_table(COLUMNS, table_rows(figures), title)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None) -> None:
    """A table in the terminal, or tab-separated lines without the title when the output is no terminal."""
    import sys

    if not sys.stdout.isatty():
        for row in (columns, *rows):
            print("\t".join(row))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
