"""MMVP-style pairs: two scenes composed from the same cut-outs that differ in one thing, and a question about it."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from mmllm.data.backgrounds import KINDS as GROUNDS
from mmllm.data.backgrounds import background
from mmllm.data.questions import is_plural, with_article
from mmllm.data.scenes import render_thing
from mmllm.errors import UserError
from mmllm.evaluate.made.material import Material

SIDE = 192
PAIRS = 75
EDITS = ("presence", "identity", "side", "count")
SMALLEST, LARGEST = 50, 82  # pixels of a thing's longer side: two rows of things fit above each other
GAP = 6

Pasted = tuple[Image.Image, tuple[int, int]]


@dataclass
class Pair:
    """Two pictures [S, S, 3] uint8 and one question with two options; option ``right[i]`` is true of picture i.

    Attributes:
        edit: what was changed.
        differs: [S, S] bool, the pixels that may differ between the two.
    """

    edit: str
    images: tuple[np.ndarray, np.ndarray]
    question: str
    options: tuple[str, str]
    right: tuple[int, int]
    differs: np.ndarray


def _fit(rng: np.random.Generator, m: Material, label: str) -> Image.Image:
    paths = m.cutouts(label)
    with Image.open(paths[int(rng.integers(len(paths)))]) as opened:
        tile = opened.convert("RGBA")
    return render_thing(rng, tile, int(rng.integers(SMALLEST, LARGEST)), False, False)


def _row(y: int, picture: Image.Image) -> int:
    """Top of a thing that stands in the middle of the upper (0) or lower (1) half."""
    return y * SIDE // 2 + (SIDE // 2 - picture.height) // 2


def make_pair(m: Material, index: int) -> Pair:
    """The pair of this index; the kinds of change take turns.

    Raises:
        UserError: fewer than three things with cut-outs.
    """
    rng, edit = m.rng(71, index), EDITS[index % len(EDITS)]
    usable = [x for x in m.labels if m.cutouts(x)]
    if len(usable) < 3:
        raise UserError("fewer than three things have cut-outs", m.root / "tiles", "build the dataset again")
    by, thing, other = (usable[int(i)] for i in rng.permutation(len(usable))[:3])
    ground = Image.fromarray(background(rng, SIDE, GROUNDS))
    half = int(rng.integers(2))
    stand, shown = _fit(rng, m, by), _fit(rng, m, thing)
    stays = (stand, (int(rng.integers(GAP, SIDE - stand.width - GAP)), _row(half, stand)))
    low, x = _row(1 - half, shown), int(rng.integers(GAP, SIDE - shown.width - GAP))
    first: list[Pasted] = [(shown, (x, low))]
    second: list[Pasted] = []
    if edit == "presence":
        verb = "Are" if is_plural(thing) else "Is"
        question, options = f"{verb} there {with_article(thing)} in the picture?", ("yes", "no")
    elif edit == "count":
        question, options = "How many things are there in the picture?", ("two", "one")
    elif edit == "identity":
        swapped = _fit(rng, m, other)
        middle = min(max(x + shown.width // 2 - swapped.width // 2, 0), SIDE - swapped.width)
        second = [(swapped, (middle, _row(1 - half, swapped)))]
        question, options = f"What is there beside the {by}?", (with_article(thing), with_article(other))
    else:
        x = int(rng.integers(GAP, SIDE // 2 - shown.width // 2 - SIDE // 12))
        first, second = [(shown, (x, low))], [(shown, (SIDE - x - shown.width, low))]
        question = f"On which side of the picture {'are' if is_plural(thing) else 'is'} the {thing}?"
        options = ("left", "right")
    images = tuple(_paint(ground, [stays, *things]) for things in (first, second))
    differs = np.zeros((SIDE, SIDE), bool)
    for picture, corner in (*first, *second):
        differs[corner[1] : corner[1] + picture.height, corner[0] : corner[0] + picture.width] = True
    right = (0, 1)
    if rng.random() < 0.5:
        options, right = options[::-1], (1, 0)
    if rng.random() < 0.5:
        images, right = images[::-1], right[::-1]
    return Pair(edit, images, question, options, right, differs)  # type: ignore[arg-type]


def _paint(ground: Image.Image, things: list[Pasted]) -> np.ndarray:
    canvas = ground.copy()
    for picture, corner in things:
        canvas.paste(picture, corner, picture)
    return np.asarray(canvas)


def write_mmvp(m: Material, out: Path) -> int:
    """``MMVP/``: Questions.csv and the pictures, two neighbouring rows a pair."""
    folder = out / "MMVP"
    pictures = folder / "MMVP Images"
    pictures.mkdir(parents=True, exist_ok=True)
    rows: list[list[object]] = []
    for index in range(PAIRS if m.limit is None else min(PAIRS, m.limit)):
        pair = make_pair(m, index)
        options = " ".join(f"({letter}) {words}" for letter, words in zip("ab", pair.options))
        for image, right in zip(pair.images, pair.right):
            rows.append([len(rows) + 1, pair.question, options, f"({'ab'[right]})"])
            # Blocks of 8 pixels that share no colour with others: what is equal in both stays equal.
            Image.fromarray(image).save(pictures / f"{len(rows)}.jpg", quality=95, subsampling=0)
    with (folder / "Questions.csv").open("w", encoding="utf-8", newline="") as f:
        writer = csv.writer(f, lineterminator="\n")
        writer.writerows([["Index", "Question", "Options", "Correct Answer"], *rows])
    return len(rows)
