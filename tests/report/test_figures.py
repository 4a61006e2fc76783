"""Figures survive the round trip through JSON, and bad ones are refused."""

import json

import pytest

from mmllm.errors import UserError
from mmllm.report.figures import Figure, read_figures, table_rows, write_figures


def test_round_trip_leaves_out_what_does_not_apply(tmp_path):
    figures = [
        Figure("a", 0.5, low=0.4, high=0.6, n=10, control=0.1, chance=0.01),
        Figure("wall_seconds", 12.0, "lower", unit="s"),
    ]
    path = write_figures(tmp_path / "sub" / "results.json", "mmllm eval", 3, None, [{"name": "x"}], figures, missing=[])
    data = json.loads(path.read_text())
    assert data["command"] == "mmllm eval" and data["seed"] == 3 and data["sources"] == [{"name": "x"}]
    assert data["machine"]["cores"] >= 1 and data["missing"] == []
    assert "target" not in data["figures"][0] and data["figures"][1]["unit"] == "s"
    assert read_figures(path) == figures
    assert not list(path.parent.glob("*.part"))


def test_nan_becomes_null_and_stays_valid_json(tmp_path):
    path = write_figures(tmp_path / "r.json", "x", 0, {}, [], [Figure("empty", float("nan"), low=float("inf"))])
    row = json.loads(path.read_text())["figures"][0]
    assert row == {"name": "empty", "value": None, "better": "higher"}
    assert table_rows(read_figures(path))[0][1] == "not computed"


def test_two_figures_of_one_name_and_a_bad_direction_are_refused(tmp_path):
    with pytest.raises(ValueError, match="'a'"):
        write_figures(tmp_path / "r.json", "x", 0, {}, [], [Figure("a", 1), Figure("a", 2)])
    assert not (tmp_path / "r.json").exists()
    with pytest.raises(ValueError, match="better"):
        Figure("a", 1, "up")


def test_reading_something_else_is_a_user_error(tmp_path):
    (tmp_path / "x.json").write_text("[1, 2]")
    for name in ("x.json", "absent.json"):
        with pytest.raises(UserError, match=name):
            read_figures(tmp_path / name)
