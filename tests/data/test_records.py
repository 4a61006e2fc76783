"""Records and media: conversion on the way in, absolute paths, and one line for every kind of broken file."""

from __future__ import annotations

import json
import struct
import zlib

import numpy as np
import pytest
import soundfile
from PIL import Image

from mmllm.data.media import load_audio, load_image
from mmllm.data.records import from_conversations, read_records
from mmllm.errors import UserError


def write(path, *rows):
    path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def test_paths_become_absolute_in_every_place(tmp_path):
    part = {"type": "image", "path": "../m/a.png"}
    file = write(
        tmp_path / "train.jsonl",
        {"id": "1", "image": ["a.png", "https://host/b.png"], "text": "x"},
        "\n",
        {"messages": [{"role": "user", "content": [part]}], "branches": [[{"role": "user", "content": [part]}]]},
    )
    first, second = read_records(file)
    assert first["image"] == [str(tmp_path / "a.png"), "https://host/b.png"]
    here = str(tmp_path / "../m/a.png")
    assert second["messages"][0]["content"][0]["path"] == here
    assert second["branches"][0][0]["content"][0]["path"] == here
    assert second["id"] == "train-3"


def test_llava_conversation_is_converted_with_marks_in_place():
    turns = [
        {"from": "human", "value": "First <image> then\n<image>\nWhat differs?"},
        {"from": "gpt", "value": "The colour."},
    ]
    got = from_conversations({"id": 7, "image": ["a.png", "b.png"], "conversations": turns})
    assert got["id"] == "7"
    assert got["messages"][0]["content"] == [
        {"type": "text", "text": "First"},
        {"type": "image", "path": "a.png"},
        {"type": "text", "text": "then"},
        {"type": "image", "path": "b.png"},
        {"type": "text", "text": "What differs?"},
    ]
    assert got["messages"][1] == {"role": "assistant", "content": [{"type": "text", "text": "The colour."}]}


def test_picture_without_mark_comes_first():
    got = from_conversations({"image": "a.png", "conversations": [{"from": "human", "value": "Who?"}]})
    assert [p["type"] for p in got["messages"][0]["content"]] == ["image", "text"]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("{bad\n", r"x.jsonl:2: not valid JSON"),
        ("[1]\n", r"x.jsonl:2: a record must be"),
        ('{"conversations": [{"from": "human", "value": "<image>"}]}\n', r"x.jsonl:2: more <image> marks"),
        ('{"conversations": [{"from": "cat", "value": "miaow"}]}\n', "unknown speaker 'cat'"),
    ],
)
def test_broken_records_are_named_with_file_and_line(tmp_path, row, words):
    with pytest.raises(UserError, match=words):
        read_records(write(tmp_path / "x.jsonl", {"id": "1"}, row))


def test_missing_and_binary_records_files(tmp_path):
    with pytest.raises(UserError, match="no such records file"):
        read_records(tmp_path / "none.jsonl")
    (tmp_path / "b.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="UTF-8"):
        read_records(tmp_path / "b.jsonl")


def png_of_size(width, height):
    """A PNG whose header claims a size, with no pixels behind it."""
    chunk = lambda kind, data: (  # noqa: E731
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    )
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("text.png", b"only words", "not a picture"),
        ("empty.png", b"", "not a picture"),
        ("none.png", png_of_size(0, 0), "0 pixels|broken|not a picture"),
        ("bomb.png", png_of_size(100_000, 100_000), "too large"),
        ("wide.png", png_of_size(100_000_000, 2), "too large"),
    ],
)
def test_broken_pictures(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        load_image(tmp_path / name)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_truncated_picture_folder_and_missing_file(tmp_path):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "a.jpg")
    (tmp_path / "b.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:900])
    for name, words in (("b.jpg", "broken picture"), (".", "folder"), ("c.jpg", "no such picture")):
        with pytest.raises(UserError, match=words):
            load_image(tmp_path / name)


def test_sound_is_mixed_down_and_resampled(tmp_path):
    t = np.arange(44100) / 44100
    stereo = np.stack([np.sin(2 * np.pi * 440 * t), np.zeros_like(t)], 1)
    soundfile.write(tmp_path / "a.wav", stereo, 44100)
    wave = load_audio(tmp_path / "a.wav", 16000)
    assert wave.dtype == np.float32 and len(wave) == 16000
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    assert np.abs(wave - expected)[500:-500].max() < 0.01


def test_broken_sounds(tmp_path):
    soundfile.write(tmp_path / "whole.ogg", np.random.default_rng(0).normal(size=16000) * 0.1, 16000)
    data = (tmp_path / "whole.ogg").read_bytes()
    (tmp_path / "cut.ogg").write_bytes(data[: len(data) // 3])
    (tmp_path / "text.wav").write_text("only words")
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 16000)
    soundfile.write(tmp_path / "nan.wav", np.full(100, np.nan), 16000, subtype="FLOAT")
    for name, words in (
        ("cut.ogg", "broken|cut off"),
        ("text.wav", "not a sound"),
        ("empty.wav", "empty"),
        ("nan.wav", "not numbers"),
        ("none.wav", "no such"),
    ):
        with pytest.raises(UserError, match=words):
            load_audio(tmp_path / name)
