"""Questions with options about exact scenes, in the layouts of MMBench and SEED-Bench."""

from __future__ import annotations

import base64
import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmllm.data.questions import NUMBERS, is_plural, with_article
from mmllm.evaluate.made.material import Material, Scene, centre, copy, write_json
from mmllm.evaluate.made.yes_no import beside

# SEED-Bench's names and numbers of these kinds of questions.
TYPES = {"Instance Identity": 2, "Instance Location": 4, "Instances Counting": 5, "Spatial Relation": 6}
PLACES = ("top left", "top right", "bottom left", "bottom right")
OFF_MIDDLE = 0.08
COLUMNS = ("index", "question", "hint", "A", "B", "C", "D", "answer", "category", "l2-category", "split", "image")


@dataclass
class Choice:
    """A question with four options in random order; ``right`` is the place of the true one."""

    kind: str
    question: str
    options: list[str]
    right: int


def place_of(box: dict) -> str | None:
    """The quarter of the picture that a box's middle is in; None near a border between quarters."""
    x, y = centre(box)
    if abs(x - 0.5) < OFF_MIDDLE or abs(y - 0.5) < OFF_MIDDLE:
        return None
    return PLACES[2 * (y > 0.5) + (x > 0.5)]


def choices(m: Material, s: Scene) -> list[Choice]:
    """One question of each kind that the scene allows."""
    rng, labels = m.rng(61, s.number), s.labels
    there = labels[int(rng.integers(len(labels)))]
    absent = [with_article(x) for x in m.absent(labels, 3, rng)]
    out = [mixed("Instance Identity", "Which of these is in the picture?", with_article(there), absent, rng)]
    number = len(labels)
    near = [NUMBERS[n] for n in range(1, 9) if n != number][:3]
    out.append(mixed("Instances Counting", "How many things are there in the picture?", NUMBERS[number], near, rng))
    placed = [(b["text"], place) for b in s.boxes if (place := place_of(b))]
    if placed:
        label, place = placed[int(rng.integers(len(placed)))]
        question = f"In which part of the picture {'are' if is_plural(label) else 'is'} the {label}?"
        out.append(mixed("Instance Location", question, place, [x for x in PLACES if x != place], rng))
    pair = beside(s)
    if pair:
        others = [with_article(x) for x in labels if x != pair[0]]
        others += [with_article(x) for x in m.absent(labels, 3 - len(others), rng)]
        question = "What is furthest to the left in the picture?"
        if len(s.boxes) == 2 or _clear(s):
            out.append(mixed("Spatial Relation", question, with_article(pair[0]), others, rng))
    return out


def _clear(s: Scene) -> bool:
    """The leftmost thing stands clearly before the next one."""
    first, second = s.ordered()[:2]
    return centre(second)[0] - centre(first)[0] >= OFF_MIDDLE


def mixed(kind: str, question: str, right: str, wrong: list[str], rng: np.random.Generator) -> Choice:
    """The options in random order."""
    options = [right, *wrong[:3]]
    order = [int(i) for i in rng.permutation(len(options))]
    return Choice(kind, question, [options[i] for i in order], order.index(0))


def _whole(m: Material, s: Scene) -> Iterator[Choice]:
    """Questions that have four options; a tiny vocabulary cannot give them all."""
    return (c for c in choices(m, s) if len(c.options) == 4)


def write_seed(m: Material, out: Path) -> int:
    """``SEED-Bench/``: every question of every scene."""
    rows = []
    for s in m.scenes:
        copy(s.path, out / "SEED-Bench" / "SEED-Bench-image" / s.file)
        for c in _whole(m, s):
            options = {f"choice_{letter}": words for letter, words in zip("abcd", c.options)}
            rows.append({"question_id": str(len(rows)), "question_type_id": TYPES[c.kind], "data_id": s.file,
                         "data_type": "image", "question": c.question, **options,
                         "answer": "ABCD"[c.right]})  # fmt: skip
    write_json(out / "SEED-Bench" / "SEED-Bench.json", {"questions": rows, "question_type": TYPES})
    return len(rows)


def write_mmbench(m: Material, out: Path) -> int:
    """``MMBench/mmbench_dev_en.tsv``: one question on each scene, the kinds taking turns; pictures inside."""
    path = out / "MMBench" / "mmbench_dev_en.tsv"
    path.parent.mkdir(parents=True, exist_ok=True)
    index = 0
    with path.open("w", encoding="utf-8", newline="") as f:
        writer = csv.writer(f, delimiter="\t", lineterminator="\n")
        writer.writerow(COLUMNS)
        for s in m.scenes:
            found = list(_whole(m, s))
            if not found:
                continue
            c = found[index % len(found)]
            picture = base64.b64encode(s.path.read_bytes()).decode("ascii")
            kind = c.kind.lower().replace(" ", "_")
            group = "perception" if "instance " in c.kind.lower() else "reasoning"
            writer.writerow([index, c.question, "", *c.options, "ABCD"[c.right], kind, group, "dev", picture])
            index += 1
    return index
