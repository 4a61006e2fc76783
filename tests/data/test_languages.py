"""Made-up languages: the same word in training and test data, the first one as it is, the last the poorest."""

from __future__ import annotations

import pytest

from mmllm.data.languages import MadeUpLanguages
from mmllm.errors import UserError
from mmllm.registry import make

RECORDS = [{"id": str(k), "image": "x.png", "text": [f"red cat{k}", "more"], "label": f"cat{k}"} for k in range(30)]


def test_texts_by_language():
    made = list(make("data_recipe", {"type": "made_up_languages", "count": 3}).apply(iter(RECORDS)))
    for before, after in zip(RECORDS, made):
        assert list(after["text"]) == ["l0", "l1", "l2"] and after["text"]["l0"] == before["text"][0]
        assert {k: v for k, v in after.items() if k != "text"} == {k: v for k, v in before.items() if k != "text"}
        assert len(set(after["text"].values())) == 3
        assert [len(t) for t in after["text"].values()] == [len(before["text"][0])] * 3
    # A letter is always the same other letter: the first word of all texts is one word.
    assert len({r["text"]["l2"].split()[0] for r in made}) == 1


def test_quality_falls_from_language_to_language():
    recipe = MadeUpLanguages(5, poor=0.8, seed=2)
    words = [f"word{'abcdefghij'[k % 10]}{k}" for k in range(200)]
    different = [len({recipe.word(n, w) for w in words}) for n in range(5)]
    assert different[0] == 200 and different == sorted(different, reverse=True) and 30 < different[4] < 60
    assert recipe.word(3, "cat") == MadeUpLanguages(5, poor=0.8, seed=2).word(3, "cat")


def test_mistakes_are_named():
    with pytest.raises(UserError, match="count must be"):
        MadeUpLanguages(0)
    with pytest.raises(UserError, match="poor must be"):
        MadeUpLanguages(2, poor=2)
