"""Boxes in pixels and RefCOCO's layout become boxes in 0..1; what is out of range is told in its own numbers."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from mmllm.data.check import check_file
from mmllm.data.open import open_records
from mmllm.data.records import finish_record
from mmllm.errors import UserError


def boxes(tmp_path, **record):
    made = finish_record({"id": "r", "image": "a.png", **record}, str(tmp_path / "x.jsonl"), 4)
    return [(b["xyxy"], b["text"]) for b in made["boxes"]]


def test_pixels_are_shares_of_the_stated_or_the_real_picture(tmp_path):
    Image.new("RGB", (200, 100)).save(tmp_path / "a.png")
    raw = {"boxes": [{"xyxy": [20, 10, 100, 100], "text": "cat"}], "box_unit": "pixel"}
    assert boxes(tmp_path, **raw) == [([0.1, 0.1, 0.5, 1.0], "cat")]
    assert boxes(tmp_path, **raw, width=400, height=200) == [([0.05, 0.05, 0.25, 0.5], "cat")]
    corner = {"boxes": [{"xywh": [0.25, 0.5, 0.5, 0.25], "text": "cat"}], "box_format": "xywh"}
    assert boxes(tmp_path, **corner) == [([0.25, 0.5, 0.75, 0.75], "cat")]
    plain = [{"xyxy": [0, 0, 1, 1], "text": "cat"}]
    assert boxes(tmp_path, boxes=plain) == [([0, 0, 1, 1], "cat")]


def test_refcoco_gives_a_box_for_each_sentence(tmp_path):
    Image.new("RGB", (200, 100)).save(tmp_path / "a.png")
    said = [{"sent": "left cat", "tokens": []}, {"raw": "The cat"}]
    found = boxes(tmp_path, bbox=[20, 10, 80, 90.6], sentences=said)  # COCO's boxes may stand out by a fraction
    assert found == [([0.1, 0.1, 0.5, 1.0], "left cat"), ([0.1, 0.1, 0.5, 1.0], "The cat")]
    assert boxes(tmp_path, bbox=[20, 10, 100, 100], box_format="xyxy", answer=["cat"])[0][0] == [0.1, 0.1, 0.5, 1.0]
    by_name = {"file_name": "a.png", "bbox": [20, 10, 80, 90], "sentences": ["cat"]}
    made = finish_record(by_name, str(tmp_path / "x.jsonl"), 4)
    assert made["image"] == str(tmp_path / "a.png") and made["id"] == "x-4" and "bbox" not in made


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"box_unit": "pixel", "boxes": [{"xyxy": [0, 0, 202, 50], "text": "x"}]}, r"\[0, 0, 202, 50\].*200x100"),
        ({"box_unit": "pixel", "boxes": [{"xyxy": [50, 0, 50, 50], "text": "x"}]}, "is empty or outside"),
        ({"box_unit": "pixel", "boxes": [{"xyxy": [60, 0, 50, 50], "text": "x"}]}, "is empty or outside"),
        ({"bbox": [20, 10, 80, 95], "sentences": ["x"]}, "xywh box .* is empty or outside"),
        ({"bbox": [20, 10, 0, 5], "sentences": ["x"]}, "is empty"),
        ({"box_unit": "normalised", "boxes": [{"xyxy": [0, 0, 1.5, 1], "text": "x"}]}, "outside 0..1"),
        ({"box_unit": "pixels", "boxes": []}, "did you mean 'pixel'"),
        ({"box_format": "xyhw", "boxes": []}, "did you mean"),
        ({"bbox": [1, 2, 3], "sentences": ["x"]}, "four numbers"),
        ({"bbox": [1, 2, 3, 4], "sentences": []}, "bbox without sentences"),
        ({"bbox": [1, 2, 3, 4], "sentences": ["x"], "image": "none.png"}, "none.png cannot be opened"),
    ],
)
def test_bad_boxes_are_told_with_their_line(tmp_path, record, words):
    Image.new("RGB", (200, 100)).save(tmp_path / "a.png")
    file = tmp_path / "x.jsonl"
    good = {"id": "g", "image": "a.png", "text": "x"}
    file.write_text("".join(json.dumps(r) + "\n" for r in (good, {"id": "b", "image": "a.png", **record})))
    with pytest.raises(UserError, match=f"x.jsonl:2: .*{words}"):
        list(open_records(file))
    _, problems = check_file(file)
    assert len(problems) == 1 and problems[0].startswith(f"{file}:2: ")
