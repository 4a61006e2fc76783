"""docs/effects.md, effects.json and effects.svg: every method's verdict with its interval."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from mmllm.methods import cards
from mmllm.report.figures import Figure, machine, write_figures
from mmllm.reproduce.effects.catalogue import WORDS
from mmllm.reproduce.effects.run import Result


def figure_of(result: Result) -> Figure:
    """An effect in the one form of figures: its value is the paired difference."""
    outcome = result.outcome()
    method, baseline = result.config.compare
    return Figure(
        result.slug,
        outcome.difference.mean,
        result.config.better,
        outcome.difference.low,
        outcome.difference.high,
        outcome.difference.n,
        verdict=outcome.verdict,
        arms={a: {"mean": i.mean, "low": _finite(i.low), "high": _finite(i.high)} for a, i in outcome.arms.items()},
        seeds=result.seeds,
        note=f"{result.config.metric}, {method} - {baseline}; {result.config.data} data; {result.minutes:.1f} CPU min",
    )


def table_rows(result: Result) -> list[list[str]]:
    """For the terminal: a line per arm, and one for the difference with the verdict."""
    outcome = result.outcome()
    also = [m for m in result.config.also if all(m in f for by in result.figures.values() for f in by.values())]
    rows = []
    for arm, interval in outcome.arms.items():
        more = [f"{m} {sum(result.values(m)[arm]) / len(result.seeds):.4g}" for m in also]
        rows.append([arm, _number(interval.mean), _range(interval.low, interval.high), ", ".join(more)])
    d, (method, baseline) = outcome.difference, result.config.compare
    rows.append([f"{method} - {baseline}", _number(d.mean), _range(d.low, d.high), WORDS[outcome.verdict]])
    return rows


def write_pages(results: Sequence[Result], docs: Path, size: str, command: str) -> Path:
    """Writes the three files, keeping what earlier calls wrote about other methods; returns the page.

    ``--quick`` and ``--full`` have files of their own, so that they never stand for the normal size.
    """
    stem = "effects" if size == "normal" else f"effects-{size}"
    docs.mkdir(parents=True, exist_ok=True)
    file = docs / f"{stem}.json"
    held: dict[str, dict[str, Any]] = {}
    if file.is_file():
        held = {f["name"]: f for f in json.loads(file.read_text(encoding="utf-8"))["figures"]}
    held |= {r.slug: figure_of(r).to_dict() for r in results}
    order = [c.slug for c in cards() if c.slug in held]
    figures = [Figure(**held[slug]) for slug in order]
    write_figures(file, command, None, None, None, figures)
    (docs / f"{stem}.svg").write_text(picture(figures), encoding="utf-8")
    page = docs / f"{stem}.md"
    page.write_text(_page(figures, size, stem), encoding="utf-8")
    return page


def _page(figures: Sequence[Figure], size: str, stem: str) -> str:
    from mmllm.reproduce.effects.config import effect

    about = {c.slug: c for c in cards()}
    flag = "" if size == "normal" else f" --{size}"
    where = machine()
    count = {v: sum(f.verdict == v for f in figures) for v in WORDS}
    lines = [
        "# Does each method show its effect?",
        "",
        f"Written by `mmllm reproduce SLUG{flag}` for each method, or `mmllm reproduce --shelf 1{flag}` for all"
        f" ({where['cpu']}, {where['cores']} cores). Each method runs against a baseline through `mmllm align`, with"
        " the same budget and seeds. The configs in `configs/effects/` were fixed before these runs; earlier looks,"
        " mostly at other seeds, and changes after them stand in the notes below. Difference: method minus baseline,"
        " mean over seeds with the 95 % interval of a paired t, without correction for the number of methods. `shown`:"
        " the whole interval lies on the expected side of zero; `opposite`: on the other side.",
        "",
    ]
    if size == "quick":
        lines += ["**Quick: two seeds and short runs. No verdict here counts.**", ""]
    run = {f.name for f in figures}
    missing = [f"`{c.slug}`" for c in cards() if c.module.startswith("mmllm.") and c.slug not in run]
    if missing:
        lines += [f"Not run yet ({len(missing)}): {', '.join(missing)}.", ""]
    lines += [
        f"{count['shown']} shown, {count['noise']} within noise, {count['opposite']} opposite.",
        "",
        f"![paired differences]({stem}.svg)",
        "",
        "| method | what is measured | arms | difference | verdict |",
        "|---|---|---|---|---|",
    ]
    for f in figures:
        arms = ", ".join(f"{a} {_number(i['mean'])}" for a, i in (f.arms or {}).items())
        better = "more is expected" if f.better == "higher" else "less is expected"
        cells = [
            f"`{f.name}` {about[f.name].title}",
            f"{f.note} ({better}; {f.n} seeds)",
            arms,
            f"{_number(f.value)} ({_range(f.low, f.high)})",
            WORDS[str(f.verdict)],
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "## Claims and notes", ""]
    for f in figures:
        config = effect(f.name)
        lines.append(f"- `{f.name}`: {' '.join(config.claim.split())} {' '.join(config.notes.split())}".rstrip())
    return "\n".join(lines) + "\n"


def picture(figures: Sequence[Figure]) -> str:
    """An SVG with one line per method: the interval of the difference, turned so that the expected side is right, in
    units of its own largest bound (the metrics have different scales)."""
    colours = {"shown": "#2a7f4f", "noise": "#888888", "opposite": "#b03a2e"}
    high, left, wide, line = 30 + 18 * len(figures), 210, 360, 18
    middle = left + wide / 2
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + wide + 20}" height="{high}" '
        'font-family="sans-serif" font-size="11">',
        f'<line x1="{middle}" y1="8" x2="{middle}" y2="{high - 14}" stroke="#bbb"/>',
    ]
    for i, f in enumerate(figures):
        if f.value is None or f.low is None or f.high is None:
            continue
        sign = 1 if f.better == "higher" else -1
        reach = max(abs(f.low), abs(f.high)) or 1.0
        x0, x1, x = (middle + sign * v / reach * wide / 2 for v in (f.low, f.high, f.value))
        y, colour = 18 + line * i, colours[str(f.verdict)]
        parts += [
            f'<text x="{left - 8}" y="{y + 4}" text-anchor="end">{escape(f.name)}</text>',
            f'<line x1="{min(x0, x1):.1f}" y1="{y}" x2="{max(x0, x1):.1f}" y2="{y}" stroke="{colour}"/>',
            f'<circle cx="{x:.1f}" cy="{y}" r="3.5" fill="{colour}"/>',
        ]
    parts.append(f'<text x="{middle}" y="{high - 2}" text-anchor="middle">no difference | as expected &#8594;</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _finite(value: float) -> float | None:
    return value if abs(value) != float("inf") else None


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _range(low: float | None, high: float | None) -> str:
    return f"{_number(low)} … {_number(high)}"
