"""Questions with exact answers about scenes and sounds: one wording, shared by training data and evaluation."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

BOX_SCALE = 999  # coordinates in text are integers 0..999
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight")
SIDES = ("left", "right")
SCENE_KINDS = ("caption", *["exists"] * 4, "count", "side", *["box"] * 3)  # what one scene is asked
# Labels that end in s and are singular; everything else in -s (not -ss) is taken as a plural.
_SINGULAR_S = {
    "bus",
    "cactus",
    "hibiscus",
    "octopus",
    "lotus",
    "tennis",
    "chess",
    "gas",
    "walrus",
    "platypus",
    "asparagus",
}
_SINGULAR_S |= {
    "rhinoceros",
    "hippopotamus",
    "iris",
    "albatross",
    "crocus",
    "minibus",
    "circus",
    "dais",
    "tyrannosaurus",
}
_MASS = {"bread", "rice", "corn", "cheese", "spaghetti", "popcorn", "sushi", "garlic", "butter", "bacon", "sheet music"}
_AN = re.compile(r"^(?:[aeio]|u(?!ni|s[aeiou]|k)|hour|honest|x-ray)", re.IGNORECASE)


class QA(NamedTuple):
    """One question with its exact answer and its kind.

    Kinds: exists, caption, count, side, box, region, interleaved, hear; of numbered things list, name, number.
    """

    question: str
    answer: str
    kind: str


def is_plural(label: str) -> bool:
    """True when the label's main word looks like a plural: "grapes", not "night with stars"."""
    main = re.split(r"\b(?:with|of|in|on|and|behind|over|without)\b", label.lower())[0].split()
    word = main[-1] if main else ""
    return len(word) > 3 and word.endswith("s") and not word.endswith("ss") and word not in _SINGULAR_S


def with_article(label: str) -> str:
    """ "cat" -> "a cat", "owl" -> "an owl", "grapes" -> "some grapes"."""
    label = label.strip()
    if is_plural(label) or label.lower() in _MASS:
        return f"some {label}"
    return f"{'an' if _AN.match(label) else 'a'} {label}"


def join_options(labels: Sequence[str]) -> str:
    """["cat", "dog", "bell"] -> "a cat, a dog or a bell"."""
    named = [with_article(x) for x in labels]
    return named[0] if len(named) == 1 else f"{', '.join(named[:-1])} or {named[-1]}"


def exists(label: str, present: bool) -> QA:
    """ "Is there a cat?" -> yes / no."""
    verb = "Are" if is_plural(label) else "Is"
    return QA(f"{verb} there {with_article(label)}?", "yes" if present else "no", "exists")


def caption(boxes: Sequence[Mapping[str, Any]], picture: int | None = None) -> QA:
    """ "What is in the picture?" -> "a cat, a dog." with the things from left to right.

    Args:
        boxes: the scene's objects, ``{"xyxy": [x0, y0, x1, y1] in 0..1, "text": label}``.
        picture: of several, counted from 1: "What is in picture 2?".
    """
    ordered = sorted(boxes, key=lambda b: (b["xyxy"][0] + b["xyxy"][2], b["xyxy"][1]))
    things = ", ".join(with_article(b["text"]) for b in ordered)
    which = "the picture" if picture is None else f"picture {picture}"
    return QA(f"What is in {which}?", f"{things}." if things else "nothing.", "caption")


def count(boxes: Sequence[Mapping[str, Any]]) -> QA:
    """ "How many things are there?" -> a number word."""
    return QA("How many things are there?", NUMBERS[len(boxes)], "count")


def side_of(xyxy: Sequence[float], margin: float = 0.08) -> str | None:
    """ "left" or "right" of the picture's middle; None when the centre is closer than ``margin`` to it."""
    centre = (xyxy[0] + xyxy[2]) / 2
    if abs(centre - 0.5) < margin:
        return None
    return SIDES[0] if centre < 0.5 else SIDES[1]


def side(label: str, xyxy: Sequence[float], margin: float = 0.08) -> QA | None:
    """ "Is the cat on the left or on the right?" -> left / right; None when it stands in the middle."""
    answer = side_of(xyxy, margin)
    if answer is None:
        return None
    return QA(f"{'Are' if is_plural(label) else 'Is'} the {label} on the left or on the right?", answer, "side")


def format_box(xyxy: Sequence[float]) -> str:
    """[x0, y0, x1, y1] in 0..1 -> "<box>x0,y0,x1,y1</box>" with integers 0..999."""
    return "<box>" + ",".join(str(round(min(1.0, max(0.0, v)) * BOX_SCALE)) for v in xyxy) + "</box>"


def box(label: str, xyxy: Sequence[float]) -> QA:
    """ "Where is the cat?" -> "<box>...</box>"."""
    return QA(f"Where {'are' if is_plural(label) else 'is'} the {label}?", format_box(xyxy), "box")


def refer(expression: str, places: Sequence[Sequence[float]]) -> QA:
    """ "Give the box of this: the left cat" -> its box; all of them, one after the other, where several fit."""
    return QA(f"Give the box of this: {expression}", "".join(format_box(xyxy) for xyxy in places), "box")


def region(xyxy: Sequence[float], text: str) -> QA:
    """ "What does <box>...</box> show?" -> the text of that region."""
    return QA(f"What does {format_box(xyxy)} show?", text, "region")


def thing_at(xyxy: Sequence[float], label: str) -> QA:
    """ "What does <box>...</box> show?" -> "a cat"."""
    return region(xyxy, with_article(label))


def interleaved(label: str, picture: int, present: bool) -> QA:
    """ "Is there a cat in picture 2?" -> yes / no; ``picture`` counts from 1."""
    verb = "Are" if is_plural(label) else "Is"
    answer = "yes" if present else "no"
    return QA(f"{verb} there {with_article(label)} in picture {picture}?", answer, "interleaved")


def hear(label: str, options: Sequence[str] | None = None) -> QA:
    """ "What do you hear?", or "Do you hear a cat, a dog, a bell or a lamp?" -> "a dog"."""
    question = f"Do you hear {join_options(options)}?" if options else "What do you hear?"
    return QA(question, with_article(label), "hear")


def absent_label(
    present: Sequence[str],
    vocabulary: Sequence[str],
    rng: np.random.Generator,
    near: Sequence[str] = (),
    p_near: float = 0.4,
) -> str:
    """A label of the vocabulary that is not in the scene; with ``p_near`` one of ``near`` (related) if possible."""
    pool = [x for x in near if x not in present] if near and rng.random() < p_near else []
    pool = pool or [x for x in vocabulary if x not in present]
    return pool[int(rng.integers(len(pool)))]


def scene_questions(
    boxes: Sequence[Mapping[str, Any]],
    vocabulary: Sequence[str],
    rng: np.random.Generator,
    blocks: Mapping[str, Sequence[str]] | None = None,
    kinds: Sequence[str] = SCENE_KINDS,
) -> list[QA]:
    """Questions on one scene in random order; yes and no alternate, so every scene is balanced.

    No question comes twice: a scene of one thing has but one "yes" and so gets two questions of kind ``exists``.

    Args:
        boxes: the scene's objects (labels are distinct within a scene).
        blocks: label -> related labels, from which part of the absent things is drawn (harder "no" questions).
        kinds: one entry per wanted question; ``side`` is left out when every thing stands in the middle.
    """
    labels = [b["text"] for b in boxes]
    things = [boxes[i] for i in rng.permutation(len(boxes))]
    out: list[QA] = []
    asked: set[str] = set()
    want_yes = bool(rng.integers(2))
    turn: dict[str, int] = {}
    for kind in kinds:
        k = turn[kind] = turn.get(kind, -1) + 1
        thing = things[k % len(things)]
        if kind == "caption":
            out.append(caption(boxes))
        elif kind == "count":
            out.append(count(boxes))
        elif kind == "box":
            out.append(box(thing["text"], thing["xyxy"]))
        elif kind == "side":
            found = [
                q for b in things[k % len(things) :] + things[: k % len(things)] if (q := side(b["text"], b["xyxy"]))
            ]
            out += found[:1]
        elif kind == "exists":
            if k >= 2 * len(things):
                continue
            if want_yes:
                label = next(x["text"] for x in things if x["text"] not in asked)
            else:
                near = (blocks or {}).get(thing["text"], ())
                label = absent_label([*labels, *asked], vocabulary, rng, near)
            asked.add(label)
            out.append(exists(label, want_yes))
            want_yes = not want_yes
        else:
            raise ValueError(f"unknown kind of question: {kind}")
    unique = list(dict.fromkeys(out))  # kinds may name count or caption twice
    return [unique[i] for i in rng.permutation(len(unique))]


def branch(qa: QA) -> list[dict[str, Any]]:
    """The two messages that one question adds to a conversation."""
    return [
        {"role": "user", "content": [{"type": "text", "text": qa.question}]},
        {"role": "assistant", "content": [{"type": "text", "text": qa.answer}]},
    ]


def picture_prefix(paths: Sequence[str]) -> list[dict[str, Any]]:
    """The shared first message: one picture alone, or several, each announced as "Picture k:"."""
    if len(paths) == 1:
        return [{"role": "user", "content": [{"type": "image", "path": paths[0]}]}]
    content: list[dict[str, Any]] = []
    for k, path in enumerate(paths, 1):
        content += [{"type": "text", "text": f"Picture {k}:"}, {"type": "image", "path": path}]
    return [{"role": "user", "content": content}]


def sound_prefix(path: str) -> list[dict[str, Any]]:
    """The shared first message with one sound."""
    return [{"role": "user", "content": [{"type": "audio", "path": path}]}]
