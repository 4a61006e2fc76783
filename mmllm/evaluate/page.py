"""report.html of an eval run: figures as bars with their controls, and wrong answers to look through."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmllm.errors import UserError
from mmllm.evaluate.grounding import parse_boxes
from mmllm.report.bars import bars_svg, controlled_html
from mmllm.report.cards import Asked, card, folded
from mmllm.report.figures import Figure, read_figures
from mmllm.report.html import esc, page

PER_TASK = 12
LONG = 600  # characters of a prompt or answer
FACTS = ("model", "align", "data", "decode", "seed", "limit", "control", "seconds", "command")
LEGEND = (
    '<p class="small">Drawn at random with a fixed seed, evenly from the kinds of items. Green box: truth; dashed: '
    "answer.</p>"
)

Rows = list[dict[str, Any]]


def write_eval_report(folder: str | Path, per_task: int = PER_TASK, seed: int = 0, out: Path | None = None) -> Path:
    """Writes ``report.html`` beside the ``results.json`` and ``predictions.jsonl`` of ``mmllm eval``.

    One page without script or network; pictures and sounds are inside it.

    Args:
        per_task: most wrong items of a task.
        out: another name for the page.

    Raises:
        UserError: no results, or predictions that are none.
    """
    folder = Path(folder)
    figures = read_figures(folder / "results.json")
    about = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    rows = read_rows(folder / "predictions.jsonl")
    tasks: dict[str, dict[str, Any]] = about.get("tasks") or {}
    parts = {name: [f for f in figures if f.name in set(told["figures"])] for name, told in tasks.items()}
    facts = "".join(f"<tr><td>{k}</td><td>{esc(about[k])}</td></tr>" for k in FACTS if about.get(k) is not None)
    sections = [("This run", f"<table>{facts}</table>")]
    if not tasks:
        sections.append(("Figures", bars_svg(figures) + controlled_html(figures)))
    for name in dict.fromkeys([*parts, *rows]):
        some, told = parts.get(name, []), tasks.get(name, {})
        content = f'<p class="small">{esc(describe(told))}</p>' if told else ""
        if some:
            content += bars_svg(some, name) + folded("all figures", controlled_html(some))
        sections.append((name, content + wrong_html(rows.get(name, []), some, per_task, seed)))
    path = out or folder / "report.html"
    part = path.with_name(path.name + ".part")
    part.write_text(page("mmllm eval", sections), encoding="utf-8")
    os.replace(part, path)
    return path


def read_rows(path: Path) -> dict[str, Rows]:
    """Task -> the answered items, without controls and without those that calibrate; empty without a file.

    Raises:
        UserError: a line that is no prediction.
    """
    out: dict[str, Rows] = {}
    if not path.is_file():
        return out
    with path.open(encoding="utf-8") as f:
        for number, line in enumerate(f, 1):
            try:
                row = json.loads(line)
                if not row["control"] and row["split"] != "validation":
                    out.setdefault(row["task"], []).append(row)
            except (json.JSONDecodeError, KeyError, TypeError):
                raise UserError("not a line of mmllm eval", f"{path}:{number}") from None
    return out


def describe(told: dict[str, Any]) -> str:
    """What results.json says about a task, in a line."""
    parts = [f"style {told['style']}", f"{told['items']} items", f"at most {told['max_new_tokens']} tokens"]
    parts += [f"{told['unparsed']} answers were not understood"] if told.get("unparsed") else []
    parts += [f"{told['media_left_out']} media left out"] if told.get("media_left_out") else []
    return "; ".join([*parts, *([told["note"]] if told.get("note") else [])])


def category(row: dict[str, Any]) -> str:
    """The kind of item within its task."""
    meta = row.get("meta") or {}
    return str(meta.get("kind") or meta.get("category") or row["split"])


def wrong_html(rows: Rows, figures: Sequence[Figure], per_task: int, seed: int) -> str:
    """The wrong items by kind; of a task that scores captions those with the lowest scores."""
    scored = any(f.unit == "CIDEr-D" for f in figures)
    wrong = rows if scored else [r for r in rows if r["hit"] < r["weight"]]
    if not wrong or per_task < 1:
        return '<p class="small">No wrong answer.</p>' if rows and not wrong else ""
    if scored:
        chosen = sorted(wrong, key=lambda r: r["hit"])[:per_task]
        title = f"the {len(chosen)} lowest scores of {len(rows)}"
    else:
        chosen = spread(wrong, per_task, seed)
        title = f"{len(chosen)} of {len(wrong)} wrong answers ({len(rows)} items)"
    kinds: dict[str, Rows] = {}
    for row in chosen:
        kinds.setdefault(category(row), []).append(row)
    content = "" if scored else LEGEND
    for kind, some in kinds.items():
        cards = f'<div class="cards">{"".join(card(asked(r, scored)) for r in some)}</div>'
        everything = sum(category(r) == kind for r in wrong)
        content += cards if len(kinds) == 1 else folded(f"{kind}: {len(some)} of {everything}", cards, len(kinds) < 4)
    return folded(title, content)


def spread(rows: Rows, count: int, seed: int) -> Rows:
    """``count`` rows, drawn in turn from each kind."""
    kinds: dict[str, Rows] = {}
    for i in np.random.default_rng(seed).permutation(len(rows)):
        kinds.setdefault(category(rows[i]), []).append(rows[i])
    order = [kinds[k] for k in sorted(kinds)]
    longest = max(map(len, order))
    return [some[turn] for turn in range(longest) for some in order if turn < len(some)][:count]


def asked(row: dict[str, Any], scored: bool = False) -> Asked:
    """The card of one item."""
    meta = row.get("meta") or {}
    item = Asked(f"{row['task']} {row['id']}, {category(row)}", row["media"])
    said = row.get("parsed", row["answer"])
    state = None if scored else "right" if row["hit"] >= row["weight"] else "wrong"
    item.lines.append(("prompt", cut(row.get("prompt") or row["question"]), None))
    item.lines.append(("answer", cut(row["answer"]), state if "parsed" not in row else None))
    if "parsed" in row and not scored:
        understood = "not understood" if row.get("unparsed") else in_words(said, meta)
        item.lines.append(("read as", understood, state))
    item.lines.append(("truth", in_words(meta.get("caption", row["gold"]), meta), None))
    if row.get("margin") is not None:
        item.lines.append(("margin", f"{row['margin']:.2f} nats", None))
    if scored:
        item.lines.append(("score", f"{row['hit']:.3f}", None))
    truth = box_of(row["gold"])
    if truth:
        name = str(meta.get("object") or row["question"])[:40]
        item.boxes.append((*truth, name, "truth"))
        found = box_of(said) or next(iter(parse_boxes(str(row["answer"]))), None)
        item.boxes += [(*found, "answer", "answer")] if found else []
    return item


def box_of(value: Any) -> tuple[float, float, float, float] | None:
    """Four numbers in 0..1 that are the corners of a box, None for anything else."""
    if not isinstance(value, list | tuple) or len(value) != 4:
        return None
    if not all(isinstance(v, int | float) and not isinstance(v, bool) and 0 <= v <= 1 for v in value):
        return None
    x0, y0, x1, y1 = map(float, value)
    return (x0, y0, x1, y1) if x0 < x1 and y0 < y1 else None


def in_words(value: Any, meta: dict[str, Any]) -> str:
    """A parsed answer or a truth as people read it; a letter with its option."""
    options = meta.get("options") or {}
    if isinstance(value, str) and value in options:
        return f"{value}: {options[value]}"
    if isinstance(value, list):
        return cut("; ".join(f"{v:.3f}" if isinstance(v, float) else str(v) for v in value) or "nothing")
    return cut(str(value))


def cut(text: str) -> str:
    return text if len(text) <= LONG else f"{text[:LONG]} …"
