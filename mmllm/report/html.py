"""One self-contained page: curves, tables, a gallery with drawn boxes and playable sounds; no script, no network."""

from __future__ import annotations

import base64
import html
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmllm.report.figures import COLUMNS, Figure, table_rows

COLOURS = ("#2563eb", "#d97706", "#059669", "#dc2626", "#7c3aed", "#0891b2", "#be185d", "#4d7c0f")
PICTURE_SIDE = 256
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:1100px;padding:0 1rem;color:#1f2937;background:#fff}
h1{font-size:1.6rem}h2{font-size:1.2rem;margin-top:2.2rem;border-bottom:1px solid #e5e7eb}
table{border-collapse:collapse;font-size:.88rem;width:100%}th,td{padding:.25rem .6rem;border-bottom:1px solid #e5e7eb}
th{text-align:left;background:#f9fafb}td.num{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(258px,1fr));gap:1rem}
.card{border:1px solid #e5e7eb;border-radius:8px;padding:.6rem;font-size:.88rem}.card svg{width:100%;height:auto}
.right{color:#047857}.wrong{color:#b91c1c}.small{color:#6b7280;font-size:.82rem}pre{background:#f3f4f6;padding:.7rem;overflow:auto}
.plots{display:grid;grid-template-columns:repeat(auto-fill,minmax(340px,1fr));gap:1rem}audio{width:100%}
summary{cursor:pointer;font-weight:600;margin:.5rem 0}dl{margin:.4rem 0 0}dt{font-weight:600}dd{margin:0 0 .3rem 0}
"""


@dataclass
class Answered:
    """One question with what the model said and what is true."""

    question: str
    answer: str
    truth: str
    right: bool | None = None


@dataclass
class Item:
    """One picture or sound of the gallery.

    Attributes:
        media: paths of pictures, or one sound.
        kind: "image" or "audio".
        boxes: (x0, y0, x1, y1 in 0..1, words, "truth" or "answer"), drawn on the first picture.
    """

    title: str
    media: Sequence[str]
    kind: str = "image"
    answered: list[Answered] = field(default_factory=list)
    boxes: list[tuple[float, float, float, float, str, str]] = field(default_factory=list)


def esc(text: object) -> str:
    return html.escape(str(text), quote=True)


def data_uri(path: str | Path, mime: str) -> str:
    """A file's bytes as a data URI."""
    return f"data:{mime};base64,{base64.b64encode(Path(path).read_bytes()).decode('ascii')}"


def picture_uri(path: str | Path, side: int = PICTURE_SIDE) -> str:
    """A picture, at most ``side`` pixels wide and high, as a JPEG data URI."""
    from PIL import Image

    with Image.open(path) as opened:
        picture = opened.convert("RGB")
    picture.thumbnail((side, side))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def picture_svg(path: str | Path, boxes: Sequence[tuple[float, float, float, float, str, str]] = ()) -> str:
    """A picture with boxes drawn over it: green for the truth, orange and dashed for the model's answer."""
    side = PICTURE_SIDE
    parts = [
        f'<svg viewBox="0 0 {side} {side}" role="img">',
        f'<image href="{picture_uri(path)}" width="{side}" height="{side}" preserveAspectRatio="none"/>',
    ]
    for x0, y0, x1, y1, words, kind in boxes:
        colour, dash = ("#10b981", "") if kind == "truth" else ("#f59e0b", ' stroke-dasharray="6 4"')
        parts.append(
            f'<rect x="{x0 * side:.1f}" y="{y0 * side:.1f}" width="{(x1 - x0) * side:.1f}" '
            f'height="{(y1 - y0) * side:.1f}" fill="none" stroke="{colour}" stroke-width="3"{dash}/>'
        )
        y = min(max(y0 * side - 4, 12), side - 4) if kind == "truth" else min(y1 * side + 13, side - 4)
        parts.append(
            f'<text x="{x0 * side + 2:.1f}" y="{y:.1f}" font-size="12" fill="{colour}" stroke="#000" '
            f'stroke-width="2.5" paint-order="stroke">{esc(words)}</text>'
        )
    return "".join(parts) + "</svg>"


def curve_svg(
    title: str, series: Mapping[str, Sequence[tuple[float, float]]], width: int = 360, height: int = 210
) -> str:
    """Line plot of several series of (step, value) with axes' ends labelled and a legend."""
    series = {k: [p for p in v if p[1] == p[1] and abs(p[1]) != float("inf")] for k, v in series.items()}
    points = [p for v in series.values() for p in v]
    if not points:
        return f'<div class="small">{esc(title)}: nothing logged</div>'
    x_low, x_high = min(p[0] for p in points), max(p[0] for p in points)
    y_low, y_high = min(p[1] for p in points), max(p[1] for p in points)
    x_span, y_span = (x_high - x_low) or 1.0, (y_high - y_low) or 1.0
    left, top, right, bottom = 46, 24, 8, 20 + 14 * ((len(series) + 2) // 3)

    def place(x: float, y: float) -> str:
        px = left + (x - x_low) / x_span * (width - left - right)
        return f"{px:.1f},{top + (y_high - y) / y_span * (height - top - bottom):.1f}"

    floor = height - bottom
    parts = [
        f'<svg viewBox="0 0 {width} {height}" role="img" font-family="system-ui,sans-serif" font-size="11">',
        f'<text x="{left}" y="14" font-size="13" font-weight="600">{esc(title)}</text>',
        f'<path d="M{left} {top}V{floor}H{width - right}" fill="none" stroke="#9ca3af"/>',
        f'<text x="{left - 4}" y="{top + 9}" text-anchor="end">{y_high:.3g}</text>',
        f'<text x="{left - 4}" y="{floor}" text-anchor="end">{y_low:.3g}</text>',
        f'<text x="{left}" y="{floor + 13}">{x_low:g}</text>',
        f'<text x="{width - right}" y="{floor + 13}" text-anchor="end">step {x_high:g}</text>',
    ]
    for i, (name, values) in enumerate(series.items()):
        colour = COLOURS[i % len(COLOURS)]
        line = " ".join(place(x, y) for x, y in values)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        x, y = left + (i % 3) * ((width - left) // 3), floor + 27 + 14 * (i // 3)
        parts.append(f'<text x="{x}" y="{y}" fill="{colour}">{esc(name)}</text>')
    return "".join(parts) + "</svg>"


def metric_rows(path: str | Path) -> Iterator[dict[str, Any]]:
    """The lines of a run's ``metrics.jsonl`` that belong to a step; a line cut off by a kill is left out."""
    file = Path(path)
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if "step" in row:
            yield row


def read_curves(path: str | Path) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Losses of a run's ``metrics.jsonl`` as phase -> series name -> [(step, value)].

    Every numeric entry whose name contains "loss" is a series.
    """
    phases: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in metric_rows(path):
        for key, value in row.items():
            if "loss" in key and isinstance(value, int | float):
                phase = phases.setdefault(str(row.get("phase") or ""), {})
                phase.setdefault(key, []).append((float(row["step"]), float(value)))
    return phases


def figures_html(figures: Iterable[Figure]) -> str:
    """The figures as a table; a figure's note shows as its row's tooltip."""
    figures = list(figures)
    head = "".join(f"<th>{esc(c)}</th>" for c in COLUMNS)
    body = []
    for figure, row in zip(figures, table_rows(figures), strict=True):
        cells = "".join(f'<td class="num">{esc(c)}</td>' for c in row[1:])
        note = f' title="{esc(figure.note)}"' if figure.note else ""
        body.append(f"<tr{note}><td>{esc(row[0])}</td>{cells}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def item_html(item: Item) -> str:
    """One card of the gallery; a medium that is gone is named instead of shown."""
    shown = []
    for i, path in enumerate(item.media):
        if not Path(path).is_file():
            shown.append(f'<div class="small">file is gone: {esc(Path(path).name)}</div>')
        elif item.kind == "audio":
            mime = "audio/ogg" if Path(path).suffix == ".ogg" else "audio/wav"
            shown.append(f'<audio controls preload="none" src="{data_uri(path, mime)}"></audio>')
        else:
            shown.append(picture_svg(path, item.boxes if i == 0 else ()))
    rows = []
    for a in item.answered:
        style = "" if a.right is None else ' class="right"' if a.right else ' class="wrong"'
        mark = "" if a.right is None else " ✓" if a.right else " ✗"
        rows.append(f"<dt>{esc(a.question)}</dt><dd><span{style}>{esc(a.answer) or '(nothing)'}{mark}</span>"
                    f'<br><span class="small">truth: {esc(a.truth)}</span></dd>')  # fmt: skip
    return f'<div class="card">{"".join(shown)}<div class="small">{esc(item.title)}</div><dl>{"".join(rows)}</dl></div>'


def page(title: str, sections: Sequence[tuple[str, str]]) -> str:
    """A whole page from (heading, HTML) sections."""
    body = "".join(f"<section><h2>{esc(head)}</h2>{content}</section>" for head, content in sections)
    return (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{esc(title)}</title>'
            f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{STYLE}</style></head>'
            f"<body><h1>{esc(title)}</h1>{body}</body></html>\n")  # fmt: skip


def write_report(
    path: str | Path,
    title: str,
    tables: Mapping[str, Sequence[Figure]],
    curves: Mapping[str, str | Path] | None = None,
    gallery: Sequence[Item] = (),
    facts: Mapping[str, object] | None = None,
    commands: Sequence[str] = (),
    further: Sequence[tuple[str, str]] = (),
) -> Path:
    """Writes the one-page report atomically.

    Args:
        tables: heading -> figures.
        curves: stage name -> its ``metrics.jsonl``.
        gallery: pictures and sounds with questions, answers and truths.
        facts: short lines such as machine, seed, sources.
        commands: commands to go on with.
        further: more (heading, HTML), before the commands.
    """
    sections: list[tuple[str, str]] = []
    if facts:
        lines = "".join(f"<tr><td>{esc(k)}</td><td>{esc(_plain(v))}</td></tr>" for k, v in facts.items())
        sections.append(("This run", f"<table>{lines}</table>"))
    sections += [(heading, figures_html(figures)) for heading, figures in tables.items()]
    plots = [
        curve_svg(" · ".join(filter(None, (stage, phase))), series)
        for stage, file in (curves or {}).items()
        for phase, series in read_curves(file).items()
    ]
    if plots:
        sections.append(("Losses", f'<div class="plots">{"".join(plots)}</div>'))
    pictures, sounds = ([i for i in gallery if i.kind == k] for k in ("image", "audio"))
    legend = '<p class="small">Drawn at random with a fixed seed, not chosen. Green box: truth; dashed: answer.</p>'
    for heading, items in (("New scenes", pictures), ("New sounds", sounds)):
        if items:
            sections.append((heading, f'{legend}<div class="cards">{"".join(map(item_html, items))}</div>'))
    sections += further
    if commands:
        sections.append(("Go on with", f"<pre>{esc(chr(10).join(commands))}</pre>"))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(page(title, sections), encoding="utf-8")
    os.replace(part, path)
    return path


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k}: {v}" for k, v in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
