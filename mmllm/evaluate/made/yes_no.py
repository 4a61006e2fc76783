"""POPE, MME-style and AMBER-style files from scenes with exact contents."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmllm.data.questions import NUMBERS, is_plural, side_of, with_article
from mmllm.evaluate.chair import singular
from mmllm.evaluate.made.material import Material, Scene, centre, copy, write_json
from mmllm.evaluate.pope import KINDS, pope_questions
from mmllm.evaluate.pope import write_pope as write_rows

ASKS = "Please answer yes or no."
APART = 0.1  # two things are left and right of each other when their middles differ by so much
PARTNERS = 3


def verb(label: str) -> str:
    return "Are" if is_plural(label) else "Is"


def counted(number: int) -> str:
    """2 -> "Are there two things in this image?"."""
    return f"{'Is' if number == 1 else 'Are'} there {NUMBERS[number]} thing{'' if number == 1 else 's'} in this image?"


def beside(scene: Scene) -> tuple[str, str] | None:
    """(left, right) of two things that clearly stand so, None without any."""
    things = scene.ordered()
    if len(things) < 2 or centre(things[-1])[0] - centre(things[0])[0] < APART:
        return None
    return things[0]["text"], things[-1]["text"]


def write_pope(m: Material, out: Path) -> int:
    """``POPE/``, and ``POPE_training/`` with the popular and co-occurring things of the training scenes."""
    records = [{"id": s.number, "image": s.file, "boxes": s.boxes} for s in m.scenes]
    items = 0
    for folder, statistics in (("POPE", None), ("POPE_training", m.training)):
        if statistics == []:
            continue
        (out / folder).mkdir(parents=True, exist_ok=True)
        for kind in KINDS:
            rows = pope_questions(records, kind, m.seed, m.labels, cooccur_from=statistics)
            write_rows(out / folder / f"coco_pope_{kind}.json", rows)
            items += len(rows) if folder == "POPE" else 0
    for s in m.scenes:
        copy(s.path, out / "coco" / "val2014" / s.file)
    return items


def write_mme(m: Material, out: Path) -> int:
    """``MME/{existence,count,position}``: per picture one question with yes and one with no, in random order."""
    items = 0
    for number, (task, asks) in enumerate((("existence", existence), ("count", count), ("position", position))):
        for s in m.scenes:
            rng = m.rng(51, number, s.number)
            pair = asks(m, s, rng)
            if pair is None:
                continue
            lines = [f"{pair[0]} {ASKS}\tYes", f"{pair[1]} {ASKS}\tNo"]
            path = out / "MME" / task / "questions_answers_YN" / f"{Path(s.file).stem}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join(lines[i] for i in rng.permutation(2)) + "\n", encoding="utf-8")
            copy(s.path, out / "MME" / task / "images" / s.file)
            items += 2
    return items


def existence(m: Material, s: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """(question with yes, question with no)."""
    there = s.labels[int(rng.integers(len(s.labels)))]
    other = m.absent(s.labels, 1, rng)[0]
    return tuple(f"{verb(x)} there {with_article(x)} in this image?" for x in (there, other))  # type: ignore[return-value]


def count(m: Material, s: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """The right number, and one more or one less."""
    number = len(s.boxes)
    return counted(number), counted(number + (1 if number == 1 or rng.random() < 0.5 else -1))


def position(m: Material, s: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    """The side that a thing is on, and the other one; None when everything stands in the middle."""
    placed = [b for b in s.boxes if side_of(b["xyxy"])]
    if not placed:
        return None
    thing = placed[int(rng.integers(len(placed)))]
    right = side_of(thing["xyxy"])
    sides = (right, "left" if right == "right" else "right")
    label = thing["text"]
    return tuple(f"{verb(label)} the {label} on the {x} side of this image?" for x in sides)  # type: ignore[return-value]


def write_amber(m: Material, out: Path) -> int:
    """``AMBER/``: a description of each picture, and yes/no questions on existence, number and relation.

    What a model may wrongly name (``hallu``) are the absent things that stand most often beside the present ones in
    training.
    """
    queries: list[dict[str, Any]] = []
    truths: list[dict[str, Any]] = []

    def add(image: str, query: str, kind: str, truth: str | Sequence[str], **more: Any) -> None:
        number = len(queries) + 1
        queries.append({"id": number, "image": image, "query": query})
        truths.append({"id": number, "type": kind, "truth": truth, **more})

    scenes = [s for s in m.scenes if all(len(x.split()) == 1 for x in s.labels)]  # the rule reads single words
    for s in scenes:
        image = f"AMBER_{s.number}{s.path.suffix}"
        copy(s.path, out / "AMBER" / "image" / image)
        add(image, "Describe this image.", "generative", s.labels, hallu=m.partners(s.labels, PARTNERS))
    for s in scenes:
        image, rng = f"AMBER_{s.number}{s.path.suffix}", m.rng(52, s.number)
        for query, truth in zip(existence(m, s, rng), ("yes", "no")):
            add(image, query, "discriminative-hallucination", truth)
        for query, truth in zip(count(m, s, rng), ("yes", "no")):
            add(image, query, "discriminative-attribute-number", truth)
        pair = beside(s)
        for a, b, truth in ((*pair, "yes"), (*pair[::-1], "no")) if pair else ():
            add(image, f"{verb(a)} the {a} to the left of the {b} in this image?", "relation", truth)
    folder = out / "AMBER" / "data"
    write_json(folder / "annotations.json", truths)
    write_json(folder / "relation.json", {x: [singular(x)] if singular(x) != x else [] for x in m.labels})
    (folder / "safe_words.txt").write_text("image\npicture\nleft\nright\n", encoding="utf-8")
    write_json(folder / "query" / "query_all.json", queries)
    return len(queries)
