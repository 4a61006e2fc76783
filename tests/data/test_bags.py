"""Videos of one thing among others."""

from __future__ import annotations

import pytest

from mmllm.data.bags import Bags
from mmllm.errors import UserError


def pictures():
    return iter({"id": f"{n}{k}", "image": f"{n}-{k}.png", "label": n, "text": [n]} for n in "abcd" for k in range(3))


def test_a_bag_holds_its_label_and_others():
    made = list(Bags(pictures=2, distractors=2, count=8, seed=1).apply(pictures()))
    assert [r["label"] for r in made] == list("abcd") * 2
    for record in made:
        names = [f[0] for f in record["video"]]
        assert [n == record["label"] for n in names] == record["meta"]["own"] and sum(record["meta"]["own"]) == 2
        assert len(set(names)) == 3 and len(set(record["video"])) == 4 and record["text"] == [record["label"]]
    assert made == list(Bags(pictures=2, distractors=2, count=8, seed=1).apply(pictures()))
    assert len({tuple(r["meta"]["own"]) for r in made}) > 1  # the order is drawn


def test_mistakes_are_named():
    with pytest.raises(UserError, match="4 distractors need more labels"):
        list(Bags(distractors=4).apply(pictures()))
    with pytest.raises(UserError, match="pictures and count"):
        Bags(pictures=0)
