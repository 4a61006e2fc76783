"""The questions' answers are exact, balanced and worded in one way."""

from __future__ import annotations

import numpy as np
import pytest

from mmllm.data import questions as q

BOXES = [
    {"xyxy": [0.6, 0.1, 0.9, 0.4], "text": "dog"},
    {"xyxy": [0.05, 0.5, 0.35, 0.9], "text": "owl"},
    {"xyxy": [0.4, 0.6, 0.6, 0.8], "text": "grapes"},
]
WORDS = ["dog", "owl", "grapes", "cat", "bell", "lamp", "bus"]


@pytest.mark.parametrize(
    ("label", "expected"),
    [("cat", "a cat"), ("owl", "an owl"), ("unicorn", "a unicorn"), ("umbrella", "an umbrella"),
     ("ukulele", "a ukulele"), ("grapes", "some grapes"), ("bus", "a bus"),
     ("octopus", "an octopus"), ("glass", "a glass"), ("bread", "some bread"),
     ("hot dog", "a hot dog"), ("night with stars", "a night with stars")],
)  # fmt: skip
def test_article(label: str, expected: str) -> None:
    assert q.with_article(label) == expected


def test_caption_goes_from_left_to_right() -> None:
    assert q.caption(BOXES).answer == "an owl, some grapes, a dog."
    assert q.caption(BOXES[::-1]) == q.caption(BOXES)
    assert q.count(BOXES).answer == "three"


def test_side_is_undecided_in_the_middle_and_mirrors() -> None:
    assert q.side("dog", BOXES[0]["xyxy"]) == ("Is the dog on the left or on the right?", "right", "side")
    assert q.side("owl", BOXES[1]["xyxy"]) == ("Is the owl on the left or on the right?", "left", "side")
    assert q.side("grapes", BOXES[2]["xyxy"]) is None
    x0, y0, x1, y1 = BOXES[0]["xyxy"]
    assert q.side_of([1 - x1, y0, 1 - x0, y1]) == "left"


def test_box_text_is_integers_and_clipped() -> None:
    assert q.format_box([0, 0.5, 1, 1.2]) == "<box>0,500,999,999</box>"
    assert q.box("dog", BOXES[0]["xyxy"]).answer == "<box>599,100,899,400</box>"


def test_hear_options() -> None:
    asked = q.hear("dog", ["cat", "dog", "bell", "owl"])
    assert asked.question == "Do you hear a cat, a dog, a bell or an owl?"
    assert asked.answer == "a dog"
    assert q.hear("owl").question == "What do you hear?"


def test_scene_questions_are_true_balanced_and_repeatable() -> None:
    present = {b["text"] for b in BOXES}
    yes = no = 0
    for i in range(200):
        asked = q.scene_questions(BOXES, WORDS, np.random.default_rng(i), {"dog": ["cat"]})
        assert asked == q.scene_questions(BOXES, WORDS, np.random.default_rng(i), {"dog": ["cat"]})
        for x in asked:
            if x.kind == "exists":
                label = next(w for w in WORDS if f" {w}?" in x.question)
                assert (x.answer == "yes") == (label in present)
                yes += x.answer == "yes"
                no += x.answer == "no"
        assert {x.kind for x in asked} == {"caption", "exists", "count", "side", "box"}
    assert yes == no == 400  # four of them a scene, two of each answer


def test_one_thing_is_as_balanced_as_many() -> None:
    for i in range(50):
        asked = q.scene_questions(BOXES[:1], WORDS, np.random.default_rng(i))
        assert len(set(asked)) == len(asked)
        assert sorted(x.answer for x in asked if x.kind == "exists") == ["no", "yes"]


def test_absent_label_is_never_present_and_prefers_related() -> None:
    rng = np.random.default_rng(0)
    drawn = [q.absent_label(["dog", "owl"], WORDS, rng, near=["dog", "cat"], p_near=1.0) for _ in range(20)]
    assert set(drawn) == {"cat"}
    assert {q.absent_label(["dog"], WORDS, rng) for _ in range(300)} == set(WORDS) - {"dog"}
