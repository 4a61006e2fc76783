"""Interleaved documents: both public layouts become the same record, and what does not fit together is told."""

from __future__ import annotations

import io
import json

import pytest
from PIL import Image

from mmllm.data.check import check_file
from mmllm.data.interleaved import from_interleaved
from mmllm.data.open import open_records
from mmllm.errors import UserError


def shown(record):
    """The content of a document: texts as they are, pictures in brackets."""
    (message,) = record["messages"]
    assert message["role"] == "document"
    return [p["text"] if p["type"] == "text" else [p["path"]] for p in message["content"]]


def test_mmc4_pictures_stand_before_the_sentence_that_they_were_matched_to():
    info = [
        {"image_name": "b.png", "raw_url": "http://host/b.png", "matched_text_index": 2, "matched_sim": 0.3},
        {"image_name": "a.png", "matched_text_index": 0},
        {"image_name": "c.png", "matched_text_index": 2},
    ]
    row = {"text_list": ["One.", "Two.", "Three.", " "], "image_info": info, "url": "http://host"}
    assert shown(from_interleaved(row)) == [["a.png"], "One.", " Two.", ["b.png"], ["c.png"], "Three."]


def test_obelics_keeps_the_order_of_its_lists():
    row = {"images": [None, "a.png", None, None], "texts": ["One", None, "Two", "Three"], "metadata": "[]"}
    assert shown(from_interleaved(row)) == ["One", ["a.png"], "Two", "\n\nThree"]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text_list": ["a"], "image_info": [{"image_name": "x", "matched_text_index": 1}]}, "names none of 1 texts"),
        ({"text_list": ["a"], "image_info": [{"image_name": "x"}]}, "None names none"),
        ({"text_list": ["a"], "image_info": [{"raw_url": "x", "matched_text_index": 0}]}, "without a file"),
        ({"text_list": [7]}, "must be a string"),
        ({"text_list": [" "]}, "without text"),
        ({"images": ["a.png"], "texts": ["a"]}, "place 0 needs either"),
        ({"images": [None, None], "texts": ["a", None]}, "place 1 needs either"),
        ({"images": ["a.png"], "texts": [None, "a"]}, "1 images beside 2 texts"),
    ],
)
def test_what_does_not_fit_together_is_told_with_its_line(tmp_path, row, words):
    file = tmp_path / "d.jsonl"
    file.write_text("\n".join(json.dumps(r) for r in ({"text_list": ["fine"]}, row)))
    with pytest.raises(UserError, match=words):
        list(open_records(file))
    _, problems = check_file(file)
    assert len(problems) == 1 and problems[0].startswith(f"{file}:2: ")


def test_documents_in_jsonl_have_paths_and_are_checked(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    rows = [
        {"id": "m", "text_list": ["One."], "image_info": [{"image_name": "a.png", "matched_text_index": 0}]},
        {"images": ["none.png", None], "texts": [None, "Two"]},
    ]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    first, second = open_records(tmp_path / "d.jsonl")
    assert shown(first) == [[str(tmp_path / "a.png")], "One."] and first["id"] == "m" and second["id"] == "d-2"
    _, problems = check_file(tmp_path / "d.jsonl")
    assert len(problems) == 1 and "none.png" in problems[0] and ":2:" in problems[0]


@pytest.mark.parametrize("streaming", [False, True])
def test_documents_in_parquet_bring_their_pictures_as_bytes(tmp_path, monkeypatch, streaming):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    out = io.BytesIO()
    Image.new("RGB", (4, 4), (9, 99, 199)).save(out, "PNG")
    kinds = {"images": datasets.List(datasets.Image()), "texts": datasets.List(datasets.Value("string"))}
    kinds["source"] = datasets.Value("string")
    row = {"images": [None, {"bytes": out.getvalue(), "path": None}], "texts": ["One", None], "source": "host"}
    data = datasets.Dataset.from_dict({k: [v] for k, v in row.items()}, features=datasets.Features(kinds))
    data.to_parquet(tmp_path / "d.parquet")
    (record,) = open_records({"path": str(tmp_path / "d.parquet"), "streaming": streaming})
    assert shown(record) == ["One", [out.getvalue()]] and record["meta"] == {"source": "host"}
