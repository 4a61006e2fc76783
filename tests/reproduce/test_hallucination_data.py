"""The experiment's data and questions: parts that never mix, exact twins, negatives drawn evenly, true gold answers."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from planted_source import NAMES, PLAN, make_source

from mmllm.data.records import read_records
from mmllm.errors import UserError
from mmllm.evaluate.pope import labels_of
from mmllm.reproduce.hallucination import questions as q
from mmllm.reproduce.hallucination.data import SETS, build, data_key, read_prior, read_tiles
from mmllm.reproduce.hallucination.run import caption_scenes, unrelated


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def data(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    build(PLAN, source, folder, workers=1)
    return folder


def records(data: Path, name: str) -> list[dict]:
    return list(read_records(data / name))


def test_cut_outs_of_train_dev_and_test_are_disjoint(data: Path) -> None:
    parts = json.loads((data / "planted.json").read_text())["parts"]
    allowed = {p: {t for x in parts.values() for t in x[p]} for p in ("train", "dev", "test")}
    assert not allowed["train"] & allowed["dev"] and not allowed["dev"] & allowed["test"]
    assert not allowed["train"] & allowed["test"]
    files = {"train": ["align/regions_train.jsonl"], "dev": ["eval/dev_twins.jsonl"],
             "test": ["eval/natural.jsonl", "eval/twins.jsonl", "eval/swapped.jsonl"]}  # fmt: skip
    for part, names in files.items():
        used = {t for name in names for r in records(data, name) for t in r["meta"]["tiles"]}
        assert used and used <= allowed[part]


def test_twins_are_saved_without_loss(data: Path) -> None:
    prior, scenes = read_prior(data), records(data, "eval/twins.jsonl")
    assert len(scenes) == 2 * PLAN.twins
    for shown, hidden in zip(scenes[::2], scenes[1::2]):
        a, b = shown["meta"]["a"], shown["meta"]["b"]
        assert (a, b) in prior.pairs and (shown["meta"]["twin"], hidden["meta"]["twin"]) == ("shown", "hidden")
        assert labels_of(shown) == [*labels_of(hidden), b] and a in labels_of(hidden)
        pixels = [np.asarray(Image.open(r["image"])).astype(int) for r in (shown, hidden)]
        x0, y0, x1, y1 = (round(v * PLAN.scene.size) for v in shown["boxes"][-1]["xyxy"])
        rows, columns = slice(max(0, y0 - 2), y1 + 2), slice(max(0, x0 - 2), x1 + 2)
        assert (pixels[0] != pixels[1])[rows, columns].any()
        pixels[0][rows, columns] = pixels[1][rows, columns]
        assert (pixels[0] == pixels[1]).all()


def test_training_answers_are_true_and_negatives_are_drawn_evenly(data: Path) -> None:
    prior, asked = read_prior(data), Counter()
    scenes = {os.path.normpath(r["image"]): r for r in records(data, "align/regions_train.jsonl")}
    talks = records(data, "tune/train.jsonl")
    assert len(talks) == PLAN.train
    for talk in talks:
        there = labels_of(scenes[os.path.normpath(talk["messages"][0]["content"][0]["path"])])
        yes_no = Counter()
        for question, reply in talk["branches"]:
            text, said = question["content"][0]["text"], reply["content"][0]["text"]
            if said in ("yes", "no"):
                label = next(x for x in prior.labels if f" {x}?" in text)
                assert (label in there) == (said == "yes")
                yes_no[said] += 1
                if said == "no":
                    asked[label] += 1
        assert abs(yes_no["yes"] - yes_no["no"]) <= 1
    # B is asked about as an absent thing no more often than its absence allows: the prior is not punished.
    absent = {x: sum(x not in labels_of(s) for s in scenes.values()) for x in prior.labels}
    share = {x: asked[x] / absent[x] for x in prior.labels}
    assert max(share.values()) < 2 * min(share.values())


def test_gold_answers_uses_and_clusters(data: Path) -> None:
    prior = read_prior(data)
    samples = q.test_questions(data, prior, 0)
    assert len({s.id for s in samples}) == len(samples)
    scenes = {str(r["id"]): r for name in ("natural", "twins", "swapped") for r in q.read_scenes(data, name)}
    for s in samples:
        there = labels_of(scenes[s.id.rpartition(":")[0]])
        assert s.gold == ("yes" if s.meta["object"] in there else "no")
    pairs, other = q.used_for(samples, q.PAIRS), q.used_for(samples, q.OTHER)
    assert pairs.sum() == 2 * PLAN.twins and 0 < other.sum() <= PLAN.twins
    gold = np.array([s.gold == "yes" for s in samples])
    assert gold[pairs].sum() == PLAN.twins and not gold[other].any()
    for i in np.flatnonzero(other):  # neither that B nor its A is in the picture
        there = labels_of(scenes[samples[i].id.rpartition(":")[0]])
        a = next(x for x, y in prior.pairs if y == samples[i].meta["object"])
        assert a not in there
    adversarial = q.used_for(samples, q.ADVERSARIAL)
    assert abs(gold[adversarial].mean() - 0.5) < 1e-9
    assert len({s.cluster for s in samples if q.ADVERSARIAL in s.meta["uses"]}) == PLAN.twins
    twins = {s.cluster for s in samples if q.PAIRS in s.meta["uses"]}
    assert len(twins) == PLAN.twins  # both twins are one cluster


def test_unrelated_pictures_are_never_the_own_twin(data: Path) -> None:
    samples = q.test_questions(data, read_prior(data), 0)
    stem = {s.cluster: Path(s.media[0]).name.split("_")[0] + Path(s.media[0]).parent.name for s in samples}
    for before, after in zip(samples, unrelated(samples, 0)):
        assert after.question == before.question and after.gold == before.gold
        assert Path(after.media[0]).name.split("_")[0] + Path(after.media[0]).parent.name != stem[before.cluster]


def test_captions_are_asked_of_natural_scenes_and_hidden_twins(data: Path) -> None:
    samples = caption_scenes(data, 6)
    assert len(samples) == 6 and sum(s.id.endswith("_hidden") for s in samples) == 3
    assert all(s.choices is None and s.question == "What is in the picture?" for s in samples)


def test_the_key_follows_plan_and_source(source: Path) -> None:
    key = data_key(PLAN, source)
    assert key == data_key(PLAN.model_copy(), source)
    assert key != data_key(PLAN.model_copy(update={"seed": 1}), source)


def test_mistakes_about_things_are_named(source: Path) -> None:
    assert list(read_tiles(source, 2)) == NAMES[:2]
    assert [t.id for t in read_tiles(source, ["owl"])["owl"]] == [f"v/owl-{k}" for k in range(4)]
    with pytest.raises(UserError, match="has 7 things, 8 are wanted"):
        read_tiles(source, 8)
    with pytest.raises(UserError, match="did you mean 'pear'"):
        read_tiles(source, ["peer"])


def test_sets_have_numbers_of_their_own() -> None:
    assert len({number for number, _, _ in SETS.values()}) == len(SETS)
