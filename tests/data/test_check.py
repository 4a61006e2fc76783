"""`data check` names every kind of bad record with its file and line."""

from __future__ import annotations

import json
import wave
from pathlib import Path

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner
from PIL import Image

from mmllm.cli.data import command
from mmllm.data.check import check_file
from mmllm.errors import UserError


@pytest.fixture()
def folder(tmp_path: Path) -> Path:
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "good.png")
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:1500])
    soundfile.write(tmp_path / "nan.wav", np.full(100, np.nan, np.float32), 16000, subtype="FLOAT")
    with wave.open(str(tmp_path / "empty.wav"), "wb") as f:
        f.setparams((1, 2, 16000, 0, "NONE", ""))
    return tmp_path


def ask(text: str) -> list[dict]:
    return [{"role": "user", "content": [{"type": "text", "text": text}]}]


ANSWER = [{"role": "assistant", "content": "yes"}]
BAD = [
    ({"id": "a", "image": "none.png", "text": "x"}, "no such picture"),
    ({"id": "b", "image": "text.png", "text": "x"}, "not a picture"),
    ({"id": "c", "image": "cut.png", "text": "x"}, "broken picture"),
    ({"id": "d", "audio": "nan.wav", "text": "x"}, "not numbers"),
    ({"id": "e", "audio": "empty.wav", "text": "x"}, "empty sound"),
    ({"id": "f", "image": "good.png", "text": ["x", " "]}, "empty text"),
    ({"id": "good", "image": "good.png", "text": "x"}, "already on line 1"),
    ({"id": "g", "image": "good.png", "boxes": [{"xyxy": [0.5, 0, 0.4, 1], "text": "x"}]}, "empty or outside"),
    ({"id": "h", "messages": ask("x")}, "no answer"),
    ({"id": "i", "messages": [*ask(""), *ANSWER]}, "empty text"),
    ({"id": "j", "messages": [{"role": "robot", "content": "x"}, *ANSWER]}, "role"),
    (
        {"id": "k", "messages": [{"role": "user", "content": [{"type": "image", "path": "none.png"}]}, *ANSWER]},
        "no such",
    ),
    ({"id": "l"}, "nothing in it"),
]


@pytest.mark.parametrize(("record", "message"), BAD, ids=[m for _, m in BAD])
def test_each_problem_with_its_line(folder: Path, record: dict, message: str) -> None:
    file = folder / "r.jsonl"
    good = {"id": "good", "image": "good.png", "text": ["a thing"], "boxes": [{"xyxy": [0, 0, 1, 1], "text": "x"}]}
    talk = {"id": "t", "messages": ask("Is it?"), "branches": [ANSWER]}
    file.write_text("\n".join(json.dumps(x) for x in (good, talk, record)))
    records, problems = check_file(file)
    assert records == 3
    assert len(problems) == 1
    assert problems[0].startswith(f"{file}:3: ") and message in problems[0]


def test_broken_lines_and_exit_codes(folder: Path) -> None:
    file = folder / "r.jsonl"
    file.write_text('{"id": "a", "text": "x"}\n{"id": \n[1]\n')
    records, problems = check_file(file)
    assert records == 3 and [p.split(":")[1] for p in problems] == ["2", "3"]
    assert CliRunner().invoke(command, ["check", str(file)]).exit_code == 2
    assert CliRunner().invoke(command, ["check", str(file), "--limit", "1"]).exit_code == 0
    with pytest.raises(UserError, match="cannot be read"):
        check_file(folder / "none.jsonl")
    file.write_text("")
    assert check_file(file) == (0, [f"{file}: no records"])


def test_llava_records_are_understood(folder: Path) -> None:
    talk = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "a thing"}]
    (folder / "l.jsonl").write_text(json.dumps({"id": "1", "image": "good.png", "conversations": talk}))
    assert check_file(folder / "l.jsonl") == (1, [])
