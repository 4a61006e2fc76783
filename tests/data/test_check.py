"""`data check` names every kind of bad record with its file and line."""

from __future__ import annotations

import json
import struct
import tarfile
import wave
import zlib
from pathlib import Path

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner
from PIL import Image

from mmllm.cli.data import command
from mmllm.data.check import TextLimit, check_file, words_limit
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
    with pytest.raises(UserError, match="no such records file"):
        check_file(folder / "none.jsonl")
    file.write_text("")
    assert check_file(file) == (0, [f"{file}: no records"])


def test_llava_records_are_understood(folder: Path) -> None:
    talk = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "a thing"}]
    (folder / "l.jsonl").write_text(json.dumps({"id": "1", "image": "good.png", "conversations": talk}))
    assert check_file(folder / "l.jsonl") == (1, [])


def bomb(path: Path) -> None:
    """A PNG whose header claims more pixels than Pillow takes."""
    Image.new("L", (1, 1)).save(path)
    data = bytearray(path.read_bytes())
    data[16:24] = struct.pack(">II", 10_000, 8948)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    path.write_bytes(data)


def test_what_the_config_needs_and_what_the_tower_takes(folder: Path) -> None:
    bomb(folder / "bomb.png")
    rows = [
        {"id": "a", "image": "good.png", "text": {"en": "a b", "fr": "c d e f"}},
        {"id": "b", "image": "good.png", "label": "no text, but a label"},
        {"id": "c", "text": "no picture"},
        {"id": "d", "image": [], "text": "x"},
        {"id": "e", "image": "bomb.png", "text": "x"},
        {"id": "f", "video": "none.mp4", "image": "good.png", "text": "x"},
    ]
    file = folder / "r.jsonl"
    file.write_text("\n".join(json.dumps(x) for x in rows))
    records, problems = check_file(file, needs=("image", "text"), text_limit=words_limit(3))
    assert records == 6
    for line, words in ((1, "text of 4 words is longer than 3"), (3, "no image, which is needed"), (4, "no image"),
                        (5, "too large"), (6, "no such video")):  # fmt: skip
        assert [p for p in problems if p.startswith(f"{file}:{line}: ") and words in p], (line, problems)
    assert len(problems) == 5
    told = CliRunner().invoke(command, ["check", str(file), "--needs", "image,text", "--text-limit", "3"])
    assert told.output.splitlines() == [*problems, f"{file}: 6 records, 5 problems"] and told.exit_code == 2
    with pytest.raises(UserError, match="did you mean 'image'"):
        check_file(file, needs=["imag"])


def test_a_text_limit_counts_only_what_may_be_too_long() -> None:
    counted = []
    limit = TextLimit(10, lambda t: counted.append(t) or len(t))
    assert limit.problem("123456") is None and counted == []
    assert limit.problem("1234567890") is None and limit.problem("12345678901") is not None
    assert len(counted) == 2


def test_other_formats_with_their_places(folder: Path) -> None:
    (folder / "t.csv").write_text("picture,text\ngood.png,x\nnone.png,\n")
    records, problems = check_file(folder / "t.csv", needs=["text"], columns={"image": "picture"})
    assert records == 2 and [p.split(": ")[0] for p in problems] == [f"{folder / 't.csv'}:3"] * 2
    with tarfile.open(folder / "s.tar", "w") as tar:
        for name in ("good.png", "text.png", "nan.wav"):
            tar.add(folder / name, name)
    records, problems = check_file(folder / "s.tar")
    assert records == 3 and problems[0].startswith(f"{folder / 's.tar'}:text: ") and "not a picture" in problems[0]
    assert "nan" in problems[1] and len(problems) == 2
    result = CliRunner().invoke(command, ["check", str(folder / "t.csv"), "--column", "image=picture"])
    assert result.exit_code == 2 and "no such picture" in result.output
