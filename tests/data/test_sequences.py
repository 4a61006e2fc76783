"""Sequences: order, number, draws, and what they need."""

from __future__ import annotations

import pytest

import mmllm.data.recipes  # noqa: F401  (registers the recipes)
from mmllm.errors import UserError
from mmllm.registry import make

THINGS = [
    {"id": f"{n}-{k}", "image": f"{n}-{k}.png", "text": [n, f"a picture of {n}"], "label": n}
    for n in "abcde"
    for k in (0, 1)
]


def made(records=THINGS, **options):
    return list(make("data_recipe", {"type": "sequence", **options}).apply(iter(records)))


def test_pictures_and_texts_stand_in_one_order():
    found = made(length=3, count=20)
    assert len(found) == 20 and len({r["id"] for r in found}) == 20
    for record in found:
        assert [p[0] for p in record["video"]] == record["text"] == record["meta"]["sequence"]
        assert len(set(record["text"])) == 3 and record["label"] == " > ".join(record["text"])
    assert {p for r in found for p in r["video"]} == {r["image"] for r in THINGS}
    assert len(made()) == len(THINGS) and found == made(length=3, count=20) != made(length=3, count=20, seed=1)


def test_one_text_of_all_names():
    assert all(r["text"] == ", then ".join(r["meta"]["sequence"]) for r in made(joined=", then "))


def test_backwards_is_a_record_of_its_own():
    found = made(length=3, count=4, reverse=True)
    for forth, back in zip(found[::2], found[1::2]):
        assert back["video"] == forth["video"][::-1] and back["text"] == forth["text"][::-1]
        assert back["label"] != forth["label"] and back["id"] != forth["id"]


def test_what_is_known_of_the_parts_is_listed():
    kinds = [{**r, "meta": {"kind": r["label"] * 2}} for r in THINGS[:8]] + THINGS[8:]
    for record in made(kinds, length=3, count=20):
        expected = [n * 2 if n != "e" else None for n in record["meta"]["sequence"]]
        assert record["meta"]["kind"] == expected


def test_records_without_a_picture_take_no_part():
    sounds = [{"id": n, "audio": f"{n}.wav", "text": n} for n in "xyz"]
    assert {n for r in made([*THINGS, *sounds], count=50) for n in r["text"]} == set("abcde")


def test_mistakes_are_named():
    with pytest.raises(UserError, match="needs as many labels, and there are 5"):
        made(length=6)
    with pytest.raises(UserError, match="length must be at least 2"):
        made(length=1)
