"""Writes the tables of README and docs from results files, between the marks that name the file.

    python scripts/render_tables.py [FILE.md ...]        (default: README.md and docs/*.md)

A table stands between `<!-- figures: runs/quickstart/results.json [names ...] -->` and `<!-- end figures -->`; without
names the file's headline figures are shown. Between `<!-- seeds: FILE FILE ... -->` and `<!-- end seeds -->` stands
what quickstarts of several seeds gave, beside floors and goals. A results file that is not there leaves its table as it
is.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from mmllm.report.figures import Figure, number, read_figures
from mmllm.starter.summary import FLOORS, GOALS, headline

SEEDS = re.compile(r"(<!-- seeds: (.*?) -->\n).*?(<!-- end seeds -->)", re.DOTALL)
MARK = re.compile(r"(<!-- figures: (\S+)(.*?) -->\n).*?(<!-- end figures -->)", re.DOTALL)
COLUMNS = ("figure", "value", "95 % interval", "shuffled", "chance", "floor")
RATIO_COLUMNS = ("ratio", "median", "smallest … largest pair", "bar", "what it is")


def table(figures: list[Figure]) -> str:
    """A Markdown table, one row a figure; those of benchmarks are ratios of paired runs."""
    if all(f.unit == "ratio" for f in figures):
        return ratio_table(figures)
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" + "|---:" * (len(COLUMNS) - 1) + "|"]
    for f in figures:
        unit = f" {f.unit}" if f.unit and f.unit not in ("fraction", "ratio") else ""
        interval = f"{number(f.low, f.unit)} … {number(f.high, f.unit)}" if f.low is not None else ""
        cells = [number(x, f.unit) for x in (f.control, f.chance, f.target)]
        lines.append(f"| `{f.name}` | {' | '.join([number(f.value, f.unit) + unit, interval, *cells])} |")
    return "\n".join(lines)


def ratio_table(figures: list[Figure]) -> str:
    lines = [f"| {' | '.join(RATIO_COLUMNS)} |", "|---|---:|---:|---:|---|"]
    for f in figures:
        spread = "" if f.low is None else f"{number(f.low, f.unit)} … {number(f.high, f.unit)}"
        sign = "at most" if f.better == "lower" else "at least"
        bar = "" if f.target is None else f"{sign} {number(f.target, f.unit)}"
        lines.append(f"| `{f.name}` | {number(f.value, f.unit)} | {spread} | {bar} | {f.note or ''} |")
    return "\n".join(lines)


def rendered(file: str, names: list[str]) -> str | None:
    """The table of a results file with the line that says where it comes from; None when the file is not there."""
    if not Path(file).is_file():
        return None
    about = json.loads(Path(file).read_text(encoding="utf-8"))
    figures = read_figures(file)
    chosen = [f for f in figures if f.name in names] if names else headline(figures) or figures
    machine = about["machine"]
    where = f"{machine['cores']} cores of {machine['cpu']}"
    return f"{table(chosen)}\n\n`{about['command']}`, seed {about['seed']}, {where}.\n"


def seeds_table(files: list[str]) -> str | None:
    """One column a results file, then their mean, floor and goal; None when one of the files is not there."""
    if not all(Path(file).is_file() for file in files):
        return None
    seeds = [json.loads(Path(file).read_text(encoding="utf-8"))["seed"] for file in files]
    runs = [{f.name: f for f in read_figures(file)} for file in files]
    heads = ["figure", *(f"seed {seed}" for seed in seeds), "mean", "floor", "goal"]
    lines = [f"| {' | '.join(heads)} |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    for name, goal in GOALS.items():
        found = [run[name] for run in runs]
        values = [f.value for f in found if f.value is not None]
        shown = [*(f.value for f in found), sum(values) / len(values), FLOORS[name], goal]
        lines.append(f"| `{name}` | {' | '.join(number(x, found[0].unit) for x in shown)} |")
    return "\n".join(lines) + "\n"


def main(files: list[str]) -> None:
    for path in map(Path, files or ["README.md", *map(str, sorted(Path("docs").glob("*.md")))]):

        def fill(match: re.Match[str]) -> str:
            text = rendered(match[2], match[3].split())
            return match[0] if text is None else f"{match[1]}\n{text}\n{match[4]}"

        def fill_seeds(match: re.Match[str]) -> str:
            text = seeds_table(match[2].split())
            return match[0] if text is None else f"{match[1]}\n{text}\n{match[3]}"

        old = path.read_text(encoding="utf-8")
        new = SEEDS.sub(fill_seeds, MARK.sub(fill, old))
        if new != old:
            path.write_text(new, encoding="utf-8")
            print(f"{path}: tables written")


if __name__ == "__main__":
    main(sys.argv[1:])
