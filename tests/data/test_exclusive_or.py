"""Triples by exclusive or: what they show, that pairs say nothing, and that both halves of the data number alike."""

from __future__ import annotations

from collections import Counter

import pytest

from mmllm.data.exclusive_or import ExclusiveOr
from mmllm.errors import UserError
from mmllm.registry import make

NAMES = ["ant", "bee", "cat", "dog", "eel"]
RECORDS = [{"id": f"{n}{k}", "image": f"{n}{k}.png", "text": [n], "label": n} for n in NAMES for k in range(3)]


def run(records=RECORDS, **options):
    return list(make("data_recipe", {"type": "exclusive_or", **options}).apply(iter(records)))


def test_the_third_thing_is_the_exclusive_or_of_the_others():
    made = run(bits=2, count=400, seed=1)
    pairs = Counter()
    for record in made:
        meta = record["meta"]
        a, b, c = (NAMES.index(meta[f]) for f in ("image", "text", "video"))
        assert c == a ^ b and record["label"] == NAMES[c] and record["text"] == [NAMES[b]]
        assert record["image"].startswith(NAMES[a]) and record["video"][0].startswith(NAMES[c])
        pairs[a, c] += 1
    assert len(pairs) == 16 and min(pairs.values()) > 10  # knowing a, every c is about as likely
    assert len({r["image"] for r in made}) == 12 and len(made) == len({r["id"] for r in made}) == 400
    assert made == run(bits=2, count=400, seed=1) != run(bits=2, count=400, seed=2)


def test_labels_fix_the_numbers():
    turned = list(reversed(NAMES))
    for record in run(bits=1, count=20, labels=turned):
        a, b, c = (turned.index(record["meta"][f]) for f in ("image", "text", "video"))
        assert c == a ^ b


def test_mistakes_are_named():
    with pytest.raises(UserError, match="8 things are needed, and 5 have image"):
        run(bits=3)
    with pytest.raises(UserError, match="three different"):
        ExclusiveOr(fields=["image", "text"])
    with pytest.raises(UserError, match="did you mean 'audio'"):
        ExclusiveOr(fields=["image", "text", "audios"])
