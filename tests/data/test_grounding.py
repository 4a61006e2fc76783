"""Grounding: words to boxes and boxes to words, exact through the text, readable by the evaluation's own parser."""

from __future__ import annotations

import pytest

from mmllm.data.check import check_record
from mmllm.data.recipes import apply_recipes
from mmllm.data.records import Located
from mmllm.errors import UserError
from mmllm.evaluate.grounding import parse_boxes


def one(xyxy, text):
    return {"xyxy": xyxy, "text": text}


LEFT, RIGHT = [0.1, 0.2, 0.4, 0.6], [0.5, 0.25, 1.0, 1.0]
SCENE = {"id": "s", "image": "a.png", "boxes": [one(LEFT, "cat"), one(RIGHT, "dog")], "meta": {"m": 1}}


def made(records, **options):
    items = [Located("f.jsonl", n, r) for n, r in enumerate(records, 1)]
    return list(apply_recipes(items, [{"type": "grounding", **options}]))


def asked(record):
    return {b[0]["content"][0]["text"]: b[1]["content"][0]["text"] for b in record["branches"]}


def test_each_thing_is_asked_for_both_ways():
    (item,) = made([SCENE], wording="label")
    record = item.record
    assert record["messages"] == [{"role": "user", "content": [{"type": "image", "path": "a.png"}]}]
    assert asked(record) == {
        "Where is the cat?": "<box>100,200,400,599</box>",
        "Where is the dog?": "<box>500,250,999,999</box>",
        "What does <box>100,200,400,599</box> show?": "a cat",
        "What does <box>500,250,999,999</box> show?": "a dog",
    }
    assert record["id"] == "s" and record["meta"] == {"m": 1} and "image" not in record


def test_boxes_come_back_through_the_text():
    expressions = [one(LEFT, "the left one"), one(RIGHT, "the big dog")]
    (item,) = made([{**SCENE, "boxes": expressions}], ways=["box"])
    found = asked(item.record)
    for box in expressions:
        (back,) = parse_boxes(found[f"Give the box of this: {box['text']}"])
        assert back == pytest.approx(box["xyxy"], abs=0.5 / 999 + 1e-9)


def test_a_text_of_several_boxes_asks_for_all_and_a_box_of_several_texts_takes_one():
    boxes = [one(LEFT, "cat"), one(RIGHT, "cat"), one(LEFT, "pet")]
    (item,) = made([{**SCENE, "boxes": boxes}])
    found = asked(item.record)
    assert len(parse_boxes(found["Give the box of this: cat"])) == 2
    assert found["What does <box>100,200,400,599</box> show?"] in ("cat", "pet") and len(found) == 4


def test_most_questions_are_drawn_by_the_seed():
    boxes = [one([k / 20, 0, k / 20 + 0.04, 1], f"thing {k}") for k in range(20)]
    draw = lambda seed: list(asked(made([{**SCENE, "boxes": boxes}], most=3, seed=seed)[0].record))  # noqa: E731
    assert len(draw(0)) == 3 and draw(0) == draw(0) != draw(1)


def test_records_without_boxes_and_bad_ones_keep_their_place():
    bad = {**SCENE, "boxes": [one([0.4, 0, 0.1, 1], "cat")]}
    none = {"id": "n", "image": "a.png", "text": "x"}
    kept = made([bad, none])
    assert [(i.where, i.record) for i in kept] == [("f.jsonl:1", bad), ("f.jsonl:2", none)]
    assert any("empty or outside" in p for p in check_record(bad))


def test_unknown_options_are_told():
    for options, words in (({"ways": ["boxes"]}, "did you mean 'box'"), ({"wording": "labels"}, "'label'")):
        with pytest.raises(UserError, match=words):
            made([SCENE], **options)
