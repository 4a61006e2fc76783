"""A data recipe that asks about the boxes of pictures, both ways: from words to boxes, and from boxes to words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mmllm.contracts import DataRecipe
from mmllm.data.check import box_problems
from mmllm.data.questions import QA, box, branch, picture_prefix, refer, region, thing_at
from mmllm.errors import unknown
from mmllm.registry import register

WAYS, WORDINGS = ("box", "caption"), ("expression", "label")


@register("data_recipe", "grounding")
class Grounding(DataRecipe):
    """Makes a conversation of each picture with boxes; its questions share the picture, each blind to the others.

    Records without boxes pass through, and those with a bad one, which are then rejected with their place.

    Args:
        ways: ``box`` asks for the boxes of a text (all of them where several have it), ``caption`` for the text of
            a box.
        wording: ``expression`` for texts like "the left cat in the rain"; ``label`` for names, which are asked for as
            in evaluation ("Where is the cat?").
        most: questions of one picture, drawn by ``seed``; None: all.
        seed: also draws the text of a box that has several.
    """

    def __init__(self, ways: Sequence[str] = WAYS, wording: str = "expression", most: int | None = None, seed: int = 0):
        for way in ways:
            if way not in WAYS:
                raise unknown("way", way, WAYS, "data recipe 'grounding'")
        if wording not in WORDINGS:
            raise unknown("wording", wording, WORDINGS, "data recipe 'grounding'")
        self.ways, self.wording, self.most, self.seed = list(ways), wording, most, seed

    def apply(self, records: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        rng = np.random.default_rng(self.seed)
        for record in records:
            boxes, image = record.get("boxes"), record.get("image")
            if not boxes or not image or next(box_problems(boxes), None) is not None:
                yield record
                continue
            asked = self.questions(boxes, rng)
            order = rng.permutation(len(asked))[: self.most]
            made = {"messages": picture_prefix([image]), "branches": [branch(asked[i]) for i in order]}
            yield {k: v for k, v in record.items() if k not in ("image", "text")} | made

    def questions(self, boxes: Sequence[dict[str, Any]], rng: np.random.Generator) -> list[QA]:
        """All questions about the boxes of one picture."""
        by_text: dict[str, list[Any]] = {}
        by_box: dict[tuple[float, ...], list[str]] = {}
        for one in boxes:
            by_text.setdefault(one["text"], []).append(one["xyxy"])
            by_box.setdefault(tuple(one["xyxy"]), []).append(one["text"])
        out: list[QA] = []
        if "box" in self.ways:
            for text, places in by_text.items():
                single = self.wording == "label" and len(places) == 1
                out.append(box(text, places[0]) if single else refer(text, places))
        if "caption" in self.ways:
            ask = thing_at if self.wording == "label" else region
            out += [ask(place, texts[int(rng.integers(len(texts)))]) for place, texts in by_box.items()]
        return out
