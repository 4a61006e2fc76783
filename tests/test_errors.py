"""User errors: one line with what, where and what to do; and the nearest name."""

from __future__ import annotations

import pytest

from mmllm.errors import UserError, nearest, unknown


@pytest.mark.parametrize(
    "parts, text",
    [
        (("no such file",), "no such file"),
        (("no such file", "a.yaml"), "a.yaml: no such file"),
        (("no such file", None, "check the path"), "no such file; check the path"),
        (("no such file", "a.yaml", "check the path"), "a.yaml: no such file; check the path"),
        (("bad", 0), "0: bad"),
        (("several\n  lines\tof text", "a", "do\nthis"), "a: several lines of text; do this"),
    ],
)
def test_one_line(parts, text):
    error = UserError(*parts)
    assert str(error) == text and "\n" not in str(error)
    assert error.what == parts[0]


@pytest.mark.parametrize(
    "name, near",
    [
        ("learnig_rate", "learning_rate"),
        ("learning", "learning_rate"),
        ("infoncee", "infonce"),
        ("max-steps", "max_steps"),
        ("qwxyz", None),
        ("", None),
    ],
)
def test_nearest(name, near):
    assert nearest(name, ["learning_rate", "infonce", "max_steps"]) == near


def test_nearest_of_nothing():
    assert nearest("a", []) is None


def test_unknown_names_the_nearest_or_all():
    assert (
        str(unknown("task", "popee", ["side", "pope"], "--tasks"))
        == "--tasks: unknown task 'popee'; did you mean 'pope'?"
    )
    assert str(unknown("task", "zzz", ["side", "pope"])) == "unknown task 'zzz'; valid: pope, side"
    assert str(unknown("task", "zzz", [])) == "unknown task 'zzz'; valid: none"
