"""Boxes: parsing, IoU in closed form, chance by definition."""

import pytest

from mmllm.data.questions import format_box
from mmllm.evaluate.grounding import answer_iou, iou, parse_boxes, prior_accuracy


def test_iou_closed_forms():
    unit = (0.0, 0.0, 1.0, 1.0)
    assert iou(unit, unit) == 1
    assert iou((0, 0, 0.4, 0.4), (0.5, 0.5, 1, 1)) == 0 and iou((0, 0, 0.5, 1), (0.5, 0, 1, 1)) == 0
    assert iou((0, 0, 2, 1), (1, 0, 3, 1)) == pytest.approx(1 / 3)
    assert iou((0.2, 0.2, 0.2, 0.8), unit) == 0 and iou((0.5, 0.5, 0.5, 0.5), (0.5, 0.5, 0.5, 0.5)) == 0
    assert iou((0, 0, 1, 0.5), unit) == pytest.approx(0.5)


def test_text_and_back():
    box = [0.1234, 0.05, 0.9, 1.0]
    (back,) = parse_boxes("here: " + format_box(box) + ".")
    assert back == pytest.approx(box, abs=0.5 / 999 + 1e-9)


@pytest.mark.parametrize(
    "text", ["", "left", "<box>1,2,3</box>", "<box>1,2,3,4", "<box>a,b,c,d</box>", "<box>1.5,2,3,4</box>"]
)
def test_malformed_boxes_are_no_boxes(text):
    assert parse_boxes(text) == [] and answer_iou(text, (0, 0, 1, 1)) == 0


def test_order_range_and_the_first_of_several():
    assert parse_boxes("<box>999, 500,0,0</box>") == [(0, 0, 1, pytest.approx(500 / 999))]
    assert parse_boxes("<box>0,0,1200,999</box>") == [(0, 0, 1, 1)]
    assert answer_iou("<box>0,0,999,999</box> <box>0,0,1,1</box>", (0, 0, 1, 1)) == 1


def test_prior_accuracy_is_the_share_of_agreeing_pairs():
    truths = [(0, 0, 1, 1), (0, 0, 1, 1), (0, 0, 0.1, 0.1)]
    assert prior_accuracy(truths) == pytest.approx(1 / 3) and prior_accuracy(truths[:1]) == 0
