"""The starter's conversations about scenes: what the leaning ones leave out of the balanced ones, and nothing else."""

from __future__ import annotations

from typing import Any

from mmllm.data.starter_sets import scene_conversations

WORDS = ["dog", "owl", "grapes", "cat", "bell", "lamp", "bus", "kite"]
BOXES = [
    {"xyxy": [0.6, 0.1, 0.9, 0.4], "text": "dog"},
    {"xyxy": [0.05, 0.5, 0.35, 0.9], "text": "owl"},
    {"xyxy": [0.4, 0.6, 0.6, 0.8], "text": "grapes"},
]
SCENES: list[tuple[str, list[dict[str, Any]], list[str]]] = [(f"scene{i}.png", BOXES, []) for i in range(600)]


def asked(record: dict[str, Any]) -> list[tuple[str, str]]:
    """The record's (question, answer) pairs."""
    texts = [[m["content"][0]["text"] for m in branch] for branch in record["branches"]]
    return [(question, answer) for question, answer in texts]


def answers(records: list[dict[str, Any]], answer: str) -> list[int]:
    """How often each record says ``answer``."""
    return [sum(a == answer for _, a in asked(r)) for r in records]


def test_balanced_scenes_have_as_many_no_as_yes_and_are_all_counted() -> None:
    records = scene_conversations(SCENES, WORDS, {}, seed=0, balanced=True)
    assert set(answers(records, "yes")) == set(answers(records, "no")) == {2}
    assert set(answers(records, "three")) == {1}
    assert records == scene_conversations(SCENES, WORDS, {}, seed=0, balanced=True)


def test_two_scenes_of_three_leave_out_a_no_and_one_of_three_is_counted() -> None:
    records = scene_conversations(SCENES, WORDS, {}, seed=0)
    assert set(answers(records, "yes")) == {2}
    no = answers(records, "no")
    assert set(no) == {1, 2} and abs(no.count(1) / len(no) - 2 / 3) < 0.06  # three standard deviations
    counted = answers(records, "three")
    assert set(counted) == {0, 1} and abs(sum(counted) / len(counted) - 1 / 3) < 0.06
    # All other kinds of questions are in every scene, as they are in the balanced ones.
    kinds = {len(asked(r)) - n - c for r, n, c in zip(records, no, counted, strict=True)}
    assert kinds == {len(asked(r)) - 3 for r in scene_conversations(SCENES[:1], WORDS, {}, 0, balanced=True)}
