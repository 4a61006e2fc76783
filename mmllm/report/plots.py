"""A heat map as SVG: similarities of some items with some others."""

from __future__ import annotations

from collections.abc import Sequence

from mmllm.report.html import esc

CELL, LABEL = 16, 110


def heat_svg(rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float]]) -> str:
    """Cells coloured from the smallest value (white) to the largest (blue); each names its value as a tooltip."""
    flat = [v for row in values for v in row]
    if not flat:
        return ""
    low, span = min(flat), (max(flat) - min(flat)) or 1.0
    width, height = LABEL + CELL * len(columns), LABEL + CELL * len(rows)
    parts = [f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" font-size="10">']
    for c, name in enumerate(columns):
        x = LABEL + c * CELL + 11
        parts.append(f'<text x="{x}" y="{LABEL - 4}" transform="rotate(-60 {x} {LABEL - 4})">{esc(name[:18])}</text>')
    for r, (name, row) in enumerate(zip(rows, values)):
        y = LABEL + r * CELL
        parts.append(f'<text x="{LABEL - 4}" y="{y + 12}" text-anchor="end">{esc(name[:18])}</text>')
        for c, value in enumerate(row):
            parts.append(
                f'<rect x="{LABEL + c * CELL}" y="{y}" width="{CELL - 1}" height="{CELL - 1}" '
                f'fill="rgba(37,99,235,{(value - low) / span:.3f})" stroke="#e5e7eb" stroke-width="0.5">'
                f"<title>{esc(name)}, {esc(columns[c])}: {value:.2f}</title></rect>"
            )
    return "".join([*parts, "</svg>"])
