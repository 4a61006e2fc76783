"""Wrong partners are as many as asked for, marked, and of another label; subsets of one seed lie within each other."""

from __future__ import annotations

import pytest

from mmllm.data.noise import Mismatch, Subset
from mmllm.errors import UserError
from mmllm.registry import make

RECORDS = [
    {"id": f"{label}{k}", "image": f"{label}{k}.png", "text": [label], "label": label, "meta": {"k": k}}
    for label in "abcd" for k in range(5)
]  # fmt: skip


def run(recipe, records=RECORDS):
    return list(recipe.apply(iter(records)))


def test_a_share_of_the_texts_is_wrong_and_marked():
    made = run(make("data_recipe", {"type": "mismatch", "share": 0.3, "seed": 1}))
    wrong = [r for r in made if r["meta"]["mismatch"]]
    assert len(made) == 20 and len(wrong) == 6
    for record in made:
        true = record["id"][0]
        assert (record["text"] == [record["label"]]) and (record["label"] != true) == record["meta"]["mismatch"]
        assert record["image"] == f"{record['id']}.png" and record["meta"]["k"] == int(record["id"][1])
    assert made == run(Mismatch(share=0.3, seed=1)) != run(Mismatch(share=0.3, seed=2))
    assert "mismatch" not in RECORDS[0]["meta"]


def test_a_medium_moves_alone_and_records_without_it_stay():
    records = [*RECORDS, {"id": "x", "text": ["x"], "label": "x"}]
    made = run(Mismatch("image", 1.0), records)
    assert [r["label"] for r in made] == [r["label"] for r in records]
    assert all(r["image"][0] != r["label"] for r in made[:-1])
    assert "image" not in made[-1] and not made[-1]["meta"]["mismatch"]
    assert not any(r["meta"]["mismatch"] for r in run(Mismatch(share=0.0)))


def test_subsets():
    small, large = (run(Subset(s, seed=3)) for s in (0.25, 0.5))
    assert len(small) == 5 and len(large) == 10 and all(r in large for r in small)
    assert [r["id"] for r in large] == [r["id"] for r in RECORDS if r in large]
    assert small != run(Subset(0.25, seed=4))


def test_mistakes_are_named():
    with pytest.raises(UserError, match="share must be within"):
        Subset(1.5)
    with pytest.raises(UserError, match="did you mean 'image'"):
        Mismatch("imag")
