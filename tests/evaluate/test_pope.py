"""The POPE generator keeps the paper's rules; parsers and metrics against hand-made cases."""

import json

import numpy as np
import pytest

from mmllm.errors import UserError
from mmllm.evaluate.pope import labels_of, official_question, parse_yes_no, pope_questions, write_pope, yes_no_metrics

NAMES = [f"thing{i:02d}" for i in range(30)]


def make_scenes(n=200, per_scene=4, seed=0, weights=None):
    rng = np.random.default_rng(seed)
    scenes = []
    for i in range(n):
        labels = rng.choice(NAMES, per_scene, replace=False, p=weights)
        boxes = [{"xyxy": [0.1, 0.1, 0.2, 0.2], "text": str(x)} for x in labels]
        scenes.append({"id": f"s{i}", "image": f"s{i}.jpg", "boxes": boxes})
    return scenes


@pytest.mark.parametrize("kind", ["random", "popular", "adversarial"])
def test_rules_that_hold_for_every_kind(kind):
    scenes = make_scenes()
    rows = pope_questions(scenes, kind, seed=3)
    present = {s["id"]: set(labels_of(s)) for s in scenes}
    assert len(rows) == 200 * 6 and [r["question_id"] for r in rows] == list(range(1, 1201))
    assert sum(r["label"] == "yes" for r in rows) == 600
    assert all((r["object"] in present[r["scene"]]) == (r["label"] == "yes") for r in rows)
    assert len({(r["scene"], r["object"]) for r in rows}) == len(rows)
    assert [r["label"] for r in rows] == ["yes", "no"] * 600
    assert rows == pope_questions(scenes, kind, seed=3) != pope_questions(scenes, kind, seed=4)


def test_positives_are_the_same_for_all_kinds():
    scenes = make_scenes(50)
    positives = [[r["object"] for r in pope_questions(scenes, k, 0)[::2]] for k in ("random", "popular", "adversarial")]
    assert positives[0] == positives[1] == positives[2]


def test_popular_negatives_come_by_frequency():
    weights = np.linspace(3, 0.2, 30)
    scenes = make_scenes(300, weights=weights / weights.sum())
    frequency = {x: sum(x in labels_of(s) for s in scenes) for x in NAMES}
    rows = pope_questions(scenes, "popular", 0)
    for scene in scenes:
        negatives = [r["object"] for r in rows if r["scene"] == scene["id"] and r["label"] == "no"]
        absent = sorted((x for x in NAMES if x not in labels_of(scene)), key=lambda x: (-frequency[x], x))
        assert negatives == absent[:3]


def test_adversarial_negative_is_the_most_frequent_companion_of_the_positive():
    def scene(i, *labels):
        return {"id": i, "image": f"{i}.jpg", "boxes": [{"xyxy": [0, 0, 1, 1], "text": x} for x in labels]}

    statistics = [scene(i, "fork", "plate") for i in range(9)] + [scene(9, "fork", "sun"), scene(10, "moon", "sun")]
    rows = pope_questions([scene(0, "fork"), scene(1, "kite")], "adversarial", 0,
                          vocabulary=["fork", "plate", "sun", "moon", "kite"], cooccur_from=statistics)  # fmt: skip
    assert [r["object"] for r in rows[:3]] == ["fork", "plate", "kite"]
    # A kite never stands beside anything: the random draw takes its place.
    alike = pope_questions([scene(0, "fork"), scene(1, "kite")], "random", 0,
                           vocabulary=["fork", "plate", "sun", "moon", "kite"])  # fmt: skip
    assert rows[3]["object"] == alike[3]["object"]


def test_few_objects_and_few_absent_names_stay_balanced():
    scene = {"id": 0, "image": "0.jpg", "boxes": [{"xyxy": [0, 0, 1, 1], "text": x} for x in ("a", "b", "c", "a")]}
    rows = pope_questions([scene], "popular", 0, vocabulary=["a", "b", "c", "d"])
    assert [r["label"] for r in rows] == ["yes", "no"]
    assert pope_questions([scene], "random", 0) == []
    with pytest.raises(UserError, match="did you mean 'popular'"):
        pope_questions([scene], "populr", 0)


def test_official_file(tmp_path):
    write_pope(tmp_path / "pope.json", pope_questions(make_scenes(3), "random", 0))
    rows = [json.loads(x) for x in (tmp_path / "pope.json").read_text().splitlines()]
    assert len(rows) == 18 and list(rows[0]) == ["question_id", "image", "text", "label"]
    assert official_question("owl") == "Is there an owl in the image?"


@pytest.mark.parametrize(
    "text, official, lmms, strict",
    [
        ("yes", "yes", "yes", "yes"),
        ("No.", "no", None, "no"),
        ("no, there is not", "no", None, "no"),
        ("Yes, there is no doubt", "no", None, None),
        ("It is snowing", "yes", None, None),
        ("nothing", "yes", None, None),
        ("", "yes", None, None),
        ("There is a cat. No dog", "yes", None, "no"),
    ],
)
def test_parsers(text, official, lmms, strict):
    assert [parse_yes_no(text, s) for s in ("official", "lmms", "strict")] == [official, lmms, strict]


def test_metrics_of_constant_and_missing_answers():
    labels = ["yes", "no"] * 5
    always = yes_no_metrics(["yes"] * 10, labels)
    assert always == pytest.approx({"accuracy": 0.5, "precision": 0.5, "recall": 1, "f1": 2 / 3, "yes_ratio": 1})
    never = yes_no_metrics(["no"] * 10, labels)
    assert never == {"accuracy": 0.5, "precision": 0, "recall": 0, "f1": 0, "yes_ratio": 0}
    assert yes_no_metrics([None] * 10, labels)["accuracy"] == 0
    with pytest.raises(UserError, match="style"):
        parse_yes_no("yes", "offical")
