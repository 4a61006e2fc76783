"""Sequences: several records become one with a video of their pictures and their texts in the same order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from mmllm.contracts import DataRecipe
from mmllm.data.captions import captions_of, label_of
from mmllm.errors import UserError
from mmllm.registry import register


@register("data_recipe", "sequence")
class Sequences(DataRecipe):
    """Joins ``length`` pictures of different labels, drawn at random, into one ``video``.

    The new record's ``video`` lists the pictures in order, ``text`` the first text of each in the same order, and
    ``meta.sequence`` their labels, as every other ``meta`` field lists those of its parts; its ``label`` is all of
    them, so that one order of the same things is not another.

    Args:
        length: pictures in a sequence.
        count: sequences to make; None: as many as there are records.
        joined: one text of all names in order (``a cat, then a dog``) instead of a list; with what stands between
            them, such as ``", then "``.
        reverse: each sequence also comes backwards, as a record of its own: the same things in another order.
        seed: of the draws.

    Raises:
        UserError: fewer labels with a picture than a sequence needs.
    """

    def __init__(
        self,
        length: int = 4,
        count: int | None = None,
        joined: str | None = None,
        reverse: bool = False,
        seed: int = 0,
    ):
        if length < 2 or (count is not None and count < 1):
            raise UserError("length must be at least 2 and count at least 1", "data recipe 'sequence'")
        self.length, self.count, self.joined, self.reverse, self.seed = length, count, joined, reverse, seed

    def apply(self, records: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        of_label: dict[str, list[dict[str, Any]]] = {}
        total = 0
        for record in records:
            if record.get("image") and captions_of(record):
                of_label.setdefault(label_of(record), []).append(record)
                total += 1
        names = sorted(of_label)
        if len(names) < self.length:
            what = f"a sequence of {self.length} pictures needs as many labels, and there are {len(names)}"
            raise UserError(what, "data recipe 'sequence'", "lower its length")
        rng = np.random.default_rng(self.seed)
        for number in range(total if self.count is None else self.count):
            chosen = [names[i] for i in rng.choice(len(names), self.length, replace=False)]
            parts = [of_label[n][rng.integers(len(of_label[n]))] for n in chosen]
            yield self._joined(parts, f"sequence/{number:06d}")
            if self.reverse:
                yield self._joined(parts[::-1], f"sequence/{number:06d}/reverse")

    def _joined(self, parts: list[dict[str, Any]], name: str) -> dict[str, Any]:
        texts = [captions_of(p)[0][1] for p in parts]
        labels = [label_of(p) for p in parts]
        video = [p["image"][0] if isinstance(p["image"], list) else p["image"] for p in parts]
        text = texts if self.joined is None else self.joined.join(texts)
        fields = {k: None for p in parts for k in p.get("meta") or {}}
        meta = {k: [(p.get("meta") or {}).get(k) for p in parts] for k in fields} | {"sequence": labels}
        return {"id": name, "video": video, "text": text, "label": " > ".join(labels), "meta": meta}
