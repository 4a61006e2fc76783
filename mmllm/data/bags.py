"""Several pictures of one thing, among pictures of others, as one video (a data recipe)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from mmllm.contracts import DataRecipe
from mmllm.data.captions import captions_of, label_of
from mmllm.errors import UserError
from mmllm.registry import register


@register("data_recipe", "bags")
class Bags(DataRecipe):
    """Makes videos of ``pictures`` pictures of one label and ``distractors`` of other labels, in a drawn order.

    The labels take turns. A record has its label, the texts of the label's first picture, and in ``meta.own`` which of
    the frames show the label.

    Args:
        pictures: of the label; where it has fewer, as many as it has.
        distractors: pictures of other labels, each of another.
        count: videos; None: one for each label.
        seed: of the draws.

    Raises:
        UserError: too few labels.
    """

    def __init__(self, pictures: int = 2, distractors: int = 2, count: int | None = None, seed: int = 0):
        if pictures < 1 or distractors < 0 or (count is not None and count < 1):
            raise UserError("pictures and count must be at least 1, distractors at least 0", "data recipe 'bags'")
        self.pictures, self.distractors, self.count, self.seed = pictures, distractors, count, seed

    def apply(self, records: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        held: dict[str, list[dict[str, Any]]] = {}
        for record in records:
            if record.get("image"):
                held.setdefault(label_of(record), []).append(record)
        labels = sorted(held)
        if len(labels) <= self.distractors:
            what = f"{self.distractors} distractors need more labels than there are ({len(labels)})"
            raise UserError(what, "data recipe 'bags'", "lower distractors")
        rng = np.random.default_rng(self.seed)
        for number in range(len(labels) if self.count is None else self.count):
            own = labels[number % len(labels)]
            some = held[own]
            frames = [some[i] for i in rng.permutation(len(some))[: self.pictures]]
            others = [label for label in labels if label != own]
            for k in rng.choice(len(others), self.distractors, replace=False):
                other = held[others[k]]
                frames.append(other[rng.integers(len(other))])
            order = rng.permutation(len(frames)).tolist()
            texts = [t for _, t in captions_of(some[0])]
            yield {
                "id": f"bag-{number}",
                "video": [frames[i]["image"] for i in order],
                "text": texts,
                "label": own,
                "meta": {"own": [label_of(frames[i]) == own for i in order]},
            }
