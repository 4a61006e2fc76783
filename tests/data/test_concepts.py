"""No concept stands in two splits, a missing source moves none, and the vocabulary keeps its promises."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmllm.data import concepts as c
from mmllm.data.stamps import caption_label, plain_stem
from mmllm.errors import UserError

FROZEN = Path(c.__file__).parent.parent / "data_recipes" / "starter_splits.json"


@dataclass
class Drawn:
    vendor: str
    key: str
    label: str
    category: str = "animals nature"
    subgroup: str = "animal mammal"

    @property
    def id(self) -> str:
        return f"{self.vendor}/{self.key}"


def art() -> list[Drawn]:
    names = ["cat", "dog", "hot dog", "black cat", "pig", "owl", "bus", "rose", "key", "bell"]
    out = [Drawn(v, f"1F{i}", n) for v in ("noto", "twemoji", "fluent") for i, n in enumerate(names)]
    stamps = [
        ("animals/cat_mirror", "cat"),
        ("animals/pig2", "tamworth pig"),
        ("animals/pig", "pigs"),
        ("food/dog", "hot dog"),
    ]
    stamps += [("animals/cats/tom", "a black cat"), ("animals/swine", "golden pig")]
    return out + [Drawn("stamps", k, n, k.split("/")[0]) for k, n in stamps]


def test_groups_join_by_noun_code_and_stem() -> None:
    group = c.concept_groups(art())
    assert group["noto/1F0"] == group["twemoji/1F0"] == group["stamps/animals/cat_mirror"] == group["noto/1F3"]
    assert group["stamps/animals/pig2"] == group["stamps/animals/pig"] == group["noto/1F4"]  # by stem and by noun
    assert group["noto/1F1"] != group["noto/1F5"]
    assert len(set(group.values())) < len(group)


@given(
    st.lists(
        st.tuples(st.sampled_from(["noto", "fluent", "stamps"]), st.integers(0, 9), st.integers(0, 9)), max_size=40
    )
)
def test_no_noun_code_or_stem_in_two_splits(rows: list[tuple[str, int, int]]) -> None:
    words = ["cat", "red cat", "cats", "dog", "owl", "two owls", "bus", "rose", "bell", "a dog"]
    drawn = list(
        {(v, k): Drawn(v, f"x/thing{k}" if v == "stamps" else f"1F{k}", words[w]) for v, k, w in rows}.values()
    )
    groups = c.concept_groups(drawn)
    splits = c.assign_splits(drawn, groups)
    for same in (lambda x: c.noun(x.label), lambda x: x.key if x.vendor != "stamps" else x.id):
        where: dict[str, set[str]] = {}
        for x in drawn:
            where.setdefault(same(x), set()).add(splits[x.id])
        assert all(len(s) == 1 for s in where.values())


def test_frozen_manifest_keeps_splits_when_a_source_is_missing() -> None:
    full = art()
    splits = c.assign_splits(full, c.concept_groups(full))
    frozen = {c.concept_key(x): splits[x.id] for x in full}
    part = [x for x in full if x.vendor in ("twemoji", "stamps")]
    again = c.assign_splits(part, c.concept_groups(part), frozen)
    assert all(again[x.id] == splits[x.id] for x in part)


def test_the_shipped_manifest_is_whole(tmp_path: Path) -> None:
    splits = c.read_manifest(FROZEN)
    assert set(splits.values()) == set(c.SPLITS)
    share = sum(v == "train" for v in splits.values()) / len(splits)
    assert 0.7 < share < 0.9
    data = json.loads(FROZEN.read_text())
    data["train"].append(data["test"].pop())
    bad = tmp_path / "bad.json"
    bad.write_text(json.dumps(data))
    with pytest.raises(UserError, match="checksum"):
        c.read_manifest(bad)
    c.write_manifest(tmp_path / "copy.json", splits)
    assert c.read_manifest(tmp_path / "copy.json") == splits


def test_vocabulary_takes_train_concepts_only() -> None:
    drawn = art()
    groups = c.concept_groups(drawn)
    splits = {x.id: "test" if groups[x.id] == groups["noto/1F5"] else "train" for x in drawn}
    wanted = ["pig", "owl", "cat", "dog", "unicorn", "bus"]
    found = c.scene_vocabulary(drawn, groups, splits, wanted, ["fluent"], 3)
    assert [x.label for x in found] == ["pig", "cat", "dog"]  # owl is a test concept, nobody draws a unicorn
    pig, cat, dog = found
    assert set(pig.new) == {"fluent/1F4"} and "stamps/animals/pig2" in pig.seen and "stamps/animals/swine" in pig.seen
    assert "stamps/animals/cats/tom" in cat.seen  # a black cat is a cat
    assert "stamps/food/dog" not in dog.seen  # a hot dog is no dog
    assert all(splits[i] == "train" for x in found for i in (*x.seen, *x.new))
    assert all(not i.startswith("fluent/") for x in found for i in x.seen)


@pytest.mark.parametrize(
    ("caption", "stem", "label"),
    [("A Tamworth pig.", "pig_tamworth", "tamworth pig"), ("Enter the cave.", "cave", "enter the cave"),
     ("The green light means you can go if it is safe.", "green_light2", "green light"),
     ("Hard candy–yum!", "candy", "hard candy"), ("Adenium (Desert Rose)", "adenium", "adenium")],
)  # fmt: skip
def test_caption_labels(caption: str, stem: str, label: str) -> None:
    assert caption_label(caption, stem) == label


@pytest.mark.parametrize(
    ("stem", "plain"), [("cat_mirror", "cat"), ("dog2", "dog"), ("rose-b", "rose"), ("747", "747")]
)
def test_plain_stem(stem: str, plain: str) -> None:
    assert plain_stem(stem) == plain
