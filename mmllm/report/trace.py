"""A picture of decoding token by token: for each view and for the mix the likeliest tokens, darker where likelier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmllm.report.html import esc

CELL, ROW, HEAD = 108, 20, 120


def trace_svg(steps: Sequence[Mapping[str, Any]]) -> str:
    """An SVG of steps, each ``{"token", "plausible", "views": {name: [{"token", "p"}]}, "mix": [...]}``."""
    if not steps:
        return ""
    bands = [*steps[0]["views"], "mix"]
    top = max(len(step["mix"]) for step in steps)
    height = ROW * (2 + len(bands) * (top + 1))
    width = HEAD + CELL * len(steps)
    parts = [
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        'font-family="monospace" font-size="12">'
    ]
    for x, step in enumerate(steps):
        left = HEAD + x * CELL
        parts.append(_text(left + 4, 14, repr(step["token"])[1:-1], "font-weight='bold'"))
        parts.append(_text(left + 4, 14 + ROW, f"{step['plausible']} plausible", "fill='#6b7280'"))
    for band, name in enumerate(bands):
        top_y = ROW * (2 + band * (top + 1))
        parts.append(_text(4, top_y + 14, name, "font-weight='bold'"))
        for x, step in enumerate(steps):
            best = step["mix"] if name == "mix" else step["views"][name]
            for k, entry in enumerate(best):
                y = top_y + k * ROW
                colour = "5,150,105" if entry["token"] == step["token"] else "37,99,235"
                parts.append(
                    f'<rect x="{HEAD + x * CELL}" y="{y}" width="{CELL - 4}" height="{ROW - 2}" '
                    f'fill="rgba({colour},{0.08 + 0.6 * entry["p"]:.2f})"/>'
                )
                shown = f"{entry['token'].strip()[:8] or '_'} {entry['p']:.2f}"
                parts.append(_text(HEAD + x * CELL + 4, y + 14, shown))
    return "".join([*parts, "</svg>"])


def _text(x: int, y: int, text: str, style: str = "") -> str:
    return f'<text x="{x}" y="{y}" {style}>{esc(text)}</text>'
