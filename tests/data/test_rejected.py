"""Rejected items: what screening leaves out, the list on disk, and the share above which a run stops."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from mmllm.data.check import words_limit
from mmllm.data.open import located_records
from mmllm.data.rejected import Rejected
from mmllm.data.screen import usable_records
from mmllm.errors import UserError


@pytest.fixture
def file(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    rows = [{"id": str(i), "image": "a.png", "text": "fine"} for i in range(20)]
    rows += [
        {"id": "20", "image": "a.png", "text": ["", "one two three four five", "good", "also good"]},
        {"id": "21", "image": "a.png", "text": {"en": "one two three four five", "fr": ["bon", " "]}},
        {"id": "0", "image": "a.png", "text": "twice"},
        {"id": "23", "text": "no picture"},
        {"id": "24", "image": "none.png", "text": "no file"},
        {"id": "25", "image": "a.png", "text": "one two three four five six"},
        {"id": "26", "image": "a.png", "text": " "},
    ]
    text = "".join(json.dumps(r) + "\n" for r in rows) + "{broken\n"
    (tmp_path / "r.jsonl").write_text(text)
    return tmp_path / "r.jsonl"


def test_screening_keeps_what_can_be_used_and_lists_the_rest(file, tmp_path):
    (tmp_path / "rejected.jsonl").write_text("of an earlier start\n")
    rejected = Rejected(tmp_path / "rejected.jsonl", max_share=0.25)
    good = usable_records(located_records(file), "pairs", rejected, ["image", "text"], words_limit(4))
    assert [r["id"] for r in good] == [str(i) for i in range(22)]
    assert good[20]["text"] == ["good", "also good"] and good[21]["text"] == {"fr": ["bon"]}
    rows = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert rows == rejected.rows and rejected.count() == rejected.count("pairs") == 6 and rejected.count("x") == 0
    assert [r["where"] for r in rows] == [f"{file}:{n}" for n in range(23, 29)]
    reasons = (
        "already on line 1",
        "no image",
        "no such file",
        "6 words is longer than 4",
        "empty text",
        "not valid JSON",
    )
    assert all(words in r["why"] for words, r in zip(reasons, rows, strict=True))


def test_without_a_need_nothing_is_asked_of_it(file):
    good = usable_records(located_records(file), "texts", Rejected(max_share=1), ["text"])
    assert {"23", "24", "25"} <= {r["id"] for r in good}


def test_too_many_stop_the_run_with_the_list(file, tmp_path):
    rejected = Rejected(tmp_path / "list.jsonl", max_share=0.1)
    with pytest.raises(UserError, match=r"source 'pairs': 5 of 28 items .*allows 0.1.*r.jsonl:23: .*and 2 more") as e:
        usable_records(located_records(file), "pairs", rejected, ["image", "text"])
    assert "list.jsonl" in str(e.value) and "\n" not in str(e.value)


def test_an_item_counts_once_and_only_against_its_own_source():
    rejected = Rejected(max_share=0.01)
    rejected.expect("a", 100)
    rejected.expect("b", 10)
    assert rejected.add("a", "x", "f:1", "bad") and not rejected.add("a", "x", "f:1", "bad")
    rejected.check("a")
    rejected.check("b")
    assert rejected.add("b", "x", "f:1", "bad")
    with pytest.raises(UserError, match="1 of 10 items"):
        rejected.check("b")
