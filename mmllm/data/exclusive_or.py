"""A data recipe of triples in which any two modalities say nothing about the third, and both together say all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mmllm.contracts import DataRecipe
from mmllm.data.captions import captions_of
from mmllm.errors import UserError, unknown
from mmllm.registry import register

FIELDS = ("image", "text", "audio", "video")


@register("data_recipe", "exclusive_or")
class ExclusiveOr(DataRecipe):
    """Triples of things numbered a, b and a XOR b, each thing through one of three modalities.

    The things are the first ``2 ** bits`` labels in alphabetical order, of those named in ``labels`` or else of those
    that the records have. The label of a triple is its third thing, and ``meta`` holds all three.

    Args:
        bits: of the numbers.
        count: triples; the first two things are drawn at random, each with a medium of one of its records.
        fields: which modality shows which thing; ``video`` is a picture as a film of one frame, a text the label.
        labels: of the things, so that training and test data number them alike.
        seed: of the draws.
    """

    def __init__(
        self,
        bits: int = 4,
        count: int = 1000,
        fields: Sequence[str] = ("image", "text", "video"),
        labels: Sequence[str] = (),
        seed: int = 0,
    ):
        where = "data recipe 'exclusive_or'"
        if bits < 1 or count < 1:
            raise UserError(f"bits and count must be at least 1 (got {bits}, {count})", where)
        for field in fields:
            if field not in FIELDS:
                raise unknown("field", field, FIELDS, where)
        if len(fields) != 3 or len(set(fields)) != 3:
            raise UserError(f"fields must be three different ones (got {list(fields)})", where)
        self.bits, self.count, self.fields, self.labels, self.seed = bits, count, tuple(fields), list(labels), seed

    def apply(self, records: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        media: dict[tuple[str, str], list[Any]] = {}
        for record in records:
            label = str(record.get("label") or next((t for _, t in captions_of(record)), ""))
            for field in ("image", "audio"):
                if record.get(field):
                    media.setdefault((field, label), []).append(record[field])
        things = self._things(media)
        rng = np.random.default_rng(self.seed)
        for number in range(self.count):
            a, b = (int(x) for x in rng.integers(len(things), size=2))
            shown = [things[k] for k in (a, b, a ^ b)]
            made: dict[str, Any] = {"id": f"xor/{number}"}
            for field, thing in zip(self.fields, shown):
                if field == "text":
                    made["text"] = [thing]
                else:
                    held = media[_medium(field), thing]
                    medium = held[int(rng.integers(len(held)))]
                    made[field] = [medium] if field == "video" else medium
            yield {**made, "label": shown[2], "meta": dict(zip(self.fields, shown))}

    def _things(self, media: dict[tuple[str, str], list[Any]]) -> list[str]:
        needed = {_medium(f) for f in self.fields if f != "text"}
        able = sorted({label for _, label in media if all((m, label) in media for m in needed)})
        if self.labels:
            able = [label for label in self.labels if label in able]
        if len(able) < 2**self.bits:
            what = f"{2**self.bits} things are needed, and {len(able)} have {' and '.join(sorted(needed))}"
            raise UserError(what, "data recipe 'exclusive_or'", "lower bits or give more data")
        return able[: 2**self.bits]


def _medium(field: str) -> str:
    return "image" if field == "video" else field
