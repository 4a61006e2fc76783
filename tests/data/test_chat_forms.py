"""Conversations, captions and texts in the forms that people keep them in become one form, or are told why not."""

from __future__ import annotations

import json

import pytest

from mmllm.data.chat_check import conversation_problem
from mmllm.data.chat_forms import to_conversation
from mmllm.data.records import finish_record
from mmllm.errors import UserError


def text(value):
    return {"type": "text", "text": value}


def image(path):
    return {"type": "image", "path": path}


def read(tmp_path, **record):
    return finish_record(json.loads(json.dumps(record)), str(tmp_path / "x.jsonl"), 3)


def user(*content):
    return {"role": "user", "content": list(content)}


ANSWER = {"role": "assistant", "content": "yes"}


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "path": "a.png"},
        {"type": "image", "image": "a.png"},
        {"type": "image", "url": "a.png"},
        {"type": "image_url", "image_url": {"url": "a.png"}},
        {"type": "image_url", "image_url": "a.png"},
    ],
)
def test_pictures_in_every_spelling_become_a_path(tmp_path, part):
    got = read(tmp_path, messages=[user(part, text("Is it?")), ANSWER])
    assert got["messages"][0]["content"] == [image(str(tmp_path / "a.png")), text("Is it?")]


def test_openai_sounds_become_data_uris(tmp_path):
    part = {"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}}
    (got,) = read(tmp_path, messages=[user(part), ANSWER])["messages"][0]["content"]
    assert got == {"type": "audio", "path": "data:audio/wav;base64,UklGRg=="}


def test_media_beside_messages_take_the_places_left_for_them(tmp_path):
    a, b = (image(str(tmp_path / name)) for name in ("a.png", "b.png"))
    parts = read(tmp_path, images=["a.png", "b.png"], messages=[user({"type": "image"}, text("or"), {"type": "image"})])
    marks = read(tmp_path, images=["a.png", "b.png"], messages=[{"role": "user", "content": "<image> or <image>"}])
    assert parts["messages"] == marks["messages"] == [user(a, text("or"), b)] and "images" not in parts
    first = read(tmp_path, image="a.png", messages=[{"role": "system", "content": "s"}, user(text("What?"))])
    assert first["messages"][1] == user(a, text("What?"))


@pytest.mark.parametrize(
    ("images", "content", "words"),
    [
        (["a.png"], "<image> or <image>", "more places for images than images"),
        (["a.png", "b.png"], "<image> or", r"fewer places for images \(1\) than images \(2\)"),
        (["a.png"], [{"type": "image"}, {"type": "image"}], "more places"),
        ([], "<image>", None),  # no media at all: the mark is text
    ],
)
def test_places_and_media_that_differ_in_number_are_told_with_the_line(tmp_path, images, content, words):
    record = {"images": images, "messages": [{"role": "user", "content": content}, ANSWER]}
    if words is None:
        assert read(tmp_path, **record)["messages"][0]["content"] == content
        return
    with pytest.raises(UserError, match=f"x.jsonl:3: {words}"):
        read(tmp_path, **record)


def test_captions_answer_their_picture_and_texts_alone_are_documents():
    one = to_conversation({"id": "1", "image": "a.png", "text": "a cat"})
    said = {"role": "assistant", "content": [text("a cat")]}
    assert one == {"id": "1", "messages": [user(image("a.png")), said]}
    two = to_conversation({"id": "2", "image": "a.png", "text": ["a cat", "a pet"], "meta": {"x": 1}})
    assert two["messages"] == [user(image("a.png"))] and two["branches"][0] == [said] and two["meta"] == {"x": 1}
    assert [b[0]["content"][0]["text"] for b in two["branches"]] == ["a cat", "a pet"]
    alone = to_conversation({"id": "3", "text": "Once."})
    assert alone["messages"] == [{"role": "document", "content": [text("Once.")]}]
    with pytest.raises(UserError, match="nothing to learn.*grounding"):
        to_conversation({"id": "4", "image": "a.png", "boxes": [{"xyxy": [0, 0, 1, 1], "text": "x"}]})


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([{"role": "robot", "content": "x"}, ANSWER], "role out of"),
        ([user(text("x"))], "no assistant turn"),
        ([user(image("/no/such.png")), ANSWER], "no such image"),
        ([user(image("https://host/a.png")), ANSWER], "fetch it first"),
        ([user({"type": "image"}), ANSWER], "image without a path"),
        ([user(text(" ")), ANSWER], "empty text"),
        ([user(text("Where?")), {"role": "assistant", "content": [text("<box>1,2,1000,4</box>")]}], "outside 0..999"),
        ([user(text("Where?")), {"role": "assistant", "content": "<box>9,2,3,4</box>"}], "turned round"),
        ([user(text("<box>1,2,3</box>?")), ANSWER], "not four whole numbers"),
        ([{"role": "document", "content": [text("x")]}, ANSWER], "alone"),
        ([user({"type": "video", "path": "a.mp4"}), ANSWER], "unknown type 'video'"),
    ],
)
def test_what_cannot_be_trained_on_is_told(messages, words):
    problem = conversation_problem({"id": "1", "messages": messages})
    assert problem is not None and words in problem
    good = [user(text("Where is <box></box>?")), {"role": "assistant", "content": "<box>0,0,999,999</box>"}]
    assert conversation_problem({"id": "1", "messages": good}) is None
