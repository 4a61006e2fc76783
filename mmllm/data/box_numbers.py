"""A data recipe that gives scenes an ordinal label: a number that their boxes give exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from mmllm.contracts import DataRecipe
from mmllm.errors import UserError, unknown
from mmllm.registry import register


def box_area(box: dict[str, Any]) -> float:
    """Share of the picture that a box covers, 0..1."""
    x0, y0, x1, y1 = box["xyxy"]
    return max(x1 - x0, 0.0) * max(y1 - y0, 0.0)


NUMBERS: dict[str, Callable[[list[dict[str, Any]]], float]] = {
    "area": lambda boxes: max(map(box_area, boxes)),
    "total_area": lambda boxes: sum(map(box_area, boxes)),
    "x": lambda boxes: sum(max(boxes, key=box_area)["xyxy"][::2]) / 2,
    "y": lambda boxes: sum(max(boxes, key=box_area)["xyxy"][1::2]) / 2,
    "count": lambda boxes: float(len(boxes)),
}


@register("data_recipe", "box_number")
class BoxNumber(DataRecipe):
    """Writes a number of a scene's boxes into its ``meta``, as a whole number of steps; records without boxes go.

    Args:
        what: ``area`` (share of the picture that the largest box covers), ``total_area`` (the sum over the boxes),
            ``x`` or ``y`` (centre of the largest box, 0..1) or ``count`` (boxes).
        steps: how many steps are 1.
        field: name in ``meta``; None: ``what``.
    """

    def __init__(self, what: str = "area", steps: float = 1.0, field: str | None = None):
        if what not in NUMBERS:
            raise unknown("number of boxes", what, NUMBERS, "data recipe 'box_number'")
        if steps <= 0:
            raise UserError(f"steps must be above 0 (got {steps})", "data recipe 'box_number'")
        self.what, self.steps, self.field = what, steps, field or what

    def apply(self, records: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for record in records:
            if record.get("boxes"):
                value = round(NUMBERS[self.what](record["boxes"]) * self.steps)
                yield {**record, "meta": {**(record.get("meta") or {}), self.field: value}}
