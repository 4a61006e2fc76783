"""Ordinal labels from boxes."""

from __future__ import annotations

import pytest

from mmllm.data.box_numbers import BoxNumber
from mmllm.errors import UserError

BOXES = [{"xyxy": [0.0, 0.0, 0.5, 0.2], "text": "a"}, {"xyxy": [0.5, 0.5, 1.0, 0.9], "text": "b"}]


@pytest.mark.parametrize(
    ("what", "steps", "value"), [("area", 10, 2), ("total_area", 10, 3), ("x", 4, 3), ("y", 10, 7), ("count", 1, 2)]
)
def test_numbers_are_those_of_the_boxes(what, steps, value):
    given = {"id": "1", "boxes": BOXES, "meta": {"vendor": "x"}}
    (made,) = BoxNumber(what, steps, "size").apply(iter([given, {"id": "2"}]))
    assert made["meta"] == {"vendor": "x", "size": value} and given["meta"] == {"vendor": "x"}


def test_mistakes_are_named():
    with pytest.raises(UserError, match="did you mean 'area'"):
        BoxNumber("aera")
    with pytest.raises(UserError, match="steps must be above 0"):
        BoxNumber(steps=0)
