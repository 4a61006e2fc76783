"""Figures as bars with interval, chance and controls, and as a table with a column per control."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mmllm.report.figures import Figure, number
from mmllm.report.html import COLOURS, esc

LEFT, WIDTH, ROW = 300, 420, 22
FULL = {"fraction": 1.0, "points": 200.0}  # where a bar of this unit ends; MME's tasks go to 200
NAMES = {"shuffled": "other media", "blind": "no media", "always_yes": "always yes"}
BAR, CHANCE = COLOURS[0], "#6b7280"
MARKS = {"shuffled": COLOURS[1], "blind": COLOURS[2], "always_yes": COLOURS[3]}


def controls_of(figure: Figure) -> dict[str, Mapping[str, float]]:
    """The controls by name; a figure of one control alone has it as ``shuffled``."""
    if figure.controls:
        return dict(figure.controls)
    return {} if figure.control is None else {"shuffled": {"value": figure.control}}


def can_be_bar(figure: Figure) -> bool:
    """Whether the figure lies between 0 and a known end and is no difference."""
    end = FULL.get(figure.unit or "fraction")
    if figure.value is None or end is None or "_over_" in figure.name or figure.name.endswith("_unparsed"):
        return False
    return 0 <= figure.value <= end and (figure.chance or 0) < end


def bars_svg(figures: Sequence[Figure], prefix: str = "") -> str:
    """One row per figure: a bar with its 95 % interval, a grey line at chance, a coloured one at each control.

    Args:
        prefix: left off the names.
    """
    figures = [f for f in figures if can_be_bar(f)]
    if not figures:
        return ""
    height = ROW * len(figures) + 26
    parts = [f'<svg viewBox="0 0 {LEFT + WIDTH + 80} {height}" role="img" font-family="system-ui,sans-serif" '
             f'font-size="12" style="max-width:100%">']  # fmt: skip
    for i, f in enumerate(figures):
        parts += _bar(f, i * ROW, f.name.removeprefix(prefix).strip("_") or f.name)
    x, y = LEFT, ROW * len(figures) + 16
    used = [k for k in MARKS if any(k in controls_of(f) for f in figures)]
    legend = [("chance", CHANCE), *((NAMES[k], MARKS[k]) for k in used)]
    for name, colour in legend:
        parts.append(f'<path d="M{x} {y - 9}v11" stroke="{colour}" stroke-width="2.5"/>'
                     f'<text x="{x + 6}" y="{y}" fill="{colour}">{esc(name)}</text>')  # fmt: skip
        x += 20 + 7 * len(name)
    return "".join(parts) + "</svg>"


def _bar(f: Figure, top: int, name: str) -> list[str]:
    end = FULL[f.unit or "fraction"]

    def at(value: float) -> float:
        return round(LEFT + WIDTH * min(max(value / end, 0.0), 1.0), 1)

    assert f.value is not None
    middle = top + ROW / 2
    note = f"<title>{esc(f.note)}</title>" if f.note else ""
    parts = [
        f'<g>{note}<text x="{LEFT - 8}" y="{middle + 4}" text-anchor="end">{esc(name)}</text>',
        f'<rect x="{LEFT}" y="{top + 4}" width="{WIDTH}" height="{ROW - 8}" fill="#f3f4f6"/>',
        f'<rect x="{LEFT}" y="{top + 4}" width="{at(f.value) - LEFT:.1f}" height="{ROW - 8}" fill="{BAR}" '
        'fill-opacity="0.75"/>',
    ]
    if f.low is not None and f.high is not None:
        ends = (f"M{at(x)} {middle - 4}v8" for x in (f.low, f.high))
        parts.append(f'<path d="M{at(f.low)} {middle}H{at(f.high)}{"".join(ends)}" stroke="#111827" fill="none"/>')
    marks = [] if f.chance is None else [(f.chance, CHANCE)]
    marks += [(c["value"], MARKS[k]) for k, c in controls_of(f).items() if k in MARKS]
    parts += [f'<path d="M{at(x)} {top + 2}v{ROW - 4}" stroke="{colour}" stroke-width="2.5"/>' for x, colour in marks]
    return [*parts, f'<text x="{LEFT + WIDTH + 8}" y="{middle + 4}">{number(f.value, f.unit)}</text></g>']


def controlled_html(figures: Sequence[Figure]) -> str:
    """The figures as a table with a column for each control that any of them has."""
    used = [k for k in NAMES if any(k in controls_of(f) for f in figures)]
    head = ["figure", "value", "95 % interval", *(NAMES[k] for k in used), "chance", "n"]
    body = []
    for f in figures:
        interval = "" if f.low is None or f.high is None else f"{number(f.low, f.unit)} … {number(f.high, f.unit)}"
        beside = [number(controls_of(f).get(k, {}).get("value"), f.unit) for k in used]
        value = "not computed" if f.value is None else number(f.value, f.unit)
        cells = [value, interval, *beside, number(f.chance, f.unit), "" if f.n is None else str(f.n)]
        note = f' title="{esc(f.note)}"' if f.note else ""
        row = "".join(f'<td class="num">{esc(c)}</td>' for c in cells)
        body.append(f"<tr{note}><td>{esc(f.name)}</td>{row}</tr>")
    top = "".join(f"<th>{esc(c)}</th>" for c in head)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{''.join(body)}</tbody></table>"
