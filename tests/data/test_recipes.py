"""Data recipes: what they make of records, and that places and broken lines survive them."""

from __future__ import annotations

import pytest

from mmllm.data.recipes import apply_recipes
from mmllm.data.records import Located
from mmllm.errors import UserError

PICTURES = [{"id": f"p{i}", "image": f"{i}.png", "label": label} for i, label in enumerate(["cat", "cat", "dog"])]
SOUNDS = [{"id": f"s{i}", "audio": f"{i}.wav", "text": ["cat", "a cat"]} for i in range(4)]
JOIN = {"type": "join_by_label", "field": "image", "add": ["audio"]}


def located(records):
    return [Located("r.jsonl", n + 1, r) for n, r in enumerate(records)]


def made(records, *specs):
    return [item.record for item in apply_recipes(located(records), list(specs))]


def test_join_gives_each_picture_a_sound_of_its_label():
    out = made(PICTURES + SOUNDS, JOIN)
    assert [r["id"] for r in out] == ["p0", "p1"]  # no sound is called dog; the first text names the sounds
    assert all(r["image"] == p["image"] and r["audio"] in {s["audio"] for s in SOUNDS} for r, p in zip(out, PICTURES))
    assert all("audio" not in p for p in PICTURES)


def test_join_with_keep_loses_nothing():
    out = made(PICTURES + SOUNDS, {**JOIN, "keep": True})
    assert [r["id"] for r in out] == ["p0", "p1", "p2", "s0", "s1", "s2", "s3"]
    assert "audio" in out[0] and "audio" not in out[2] and out[3:] == SOUNDS


def test_join_leaves_a_medium_that_is_there():
    whole = {"id": "w", "image": "w.png", "audio": "own.wav", "label": "cat"}
    assert made([whole, *SOUNDS], JOIN) == [whole]


def test_the_seed_decides_among_partners():
    many = [{"id": f"p{i}", "image": f"{i}.png", "label": "cat"} for i in range(30)]
    drawn = {s: [r["audio"] for r in made(many + SOUNDS, {**JOIN, "seed": s})] for s in (0, 1)}
    assert drawn[0] == [r["audio"] for r in made(many + SOUNDS, {**JOIN, "seed": 0})]
    assert drawn[0] != drawn[1] and set(drawn[0]) == {s["audio"] for s in SOUNDS}


def test_without_takes_one_field_of_its_share():
    whole = [{"id": str(i), "image": "i", "audio": "a", "text": "t"} for i in range(400)]
    out = made(whole, {"type": "without", "fields": ["image", "audio"], "share": 0.25})
    lost = [tuple(k for k in ("image", "audio", "text") if k not in r) for r in out]
    assert set(lost) == {(), ("image",), ("audio",)}
    assert 60 < 400 - lost.count(()) < 140 and abs(lost.count(("image",)) - lost.count(("audio",))) < 50
    assert out == made(whole, {"type": "without", "fields": ["image", "audio"], "share": 0.25})
    assert made(whole, {"type": "without", "share": 0.0}) == whole
    assert all(len(r) == 3 for r in made(whole, {"type": "without", "share": 1.0}))
    assert made([{"id": "x", "text": "t"}], {"type": "without", "share": 1.0}) == [{"id": "x", "text": "t"}]


def test_broken_lines_pass_through_and_places_stay():
    items = located([*PICTURES, *SOUNDS])
    items.insert(2, Located("r.jsonl", 99, None, "not JSON"))
    out = list(apply_recipes(items, [{**JOIN, "keep": True}, {"type": "without", "share": 0.0}]))
    (broken,) = [i for i in out if i.record is None]
    assert broken.where == "r.jsonl:99" and broken.problem == "not JSON" and len(out) == 8
    where = {i.record["id"]: i.where for i in out if i.record is not None}
    # What a recipe made stands under its name; what it let through stands where it was.
    assert where["p0"] == "join_by_label:0" and where["p2"] == "r.jsonl:3" and where["s3"] == "r.jsonl:7"
    assert list(apply_recipes(items, [])) == items


def test_unknown_recipes_and_options_are_named_before_anything_is_read():
    def unread():
        raise AssertionError("read")
        yield

    with pytest.raises(UserError, match="join_by_label"):
        apply_recipes(unread(), ["join_by_lable"], "source 'x', recipes")
    with pytest.raises(UserError, match="unknown option 'feild'"):
        apply_recipes(unread(), [{"type": "join_by_label", "feild": "image"}])
