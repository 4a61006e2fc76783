"""The page of runs: everything logged is drawn, settings that differ are named, media are inside the file."""

import json

import pytest
import torch
from PIL import Image

from mmllm.cli.main import main
from mmllm.errors import UserError
from mmllm.evaluate.nearest import nearest_page
from mmllm.report.figures import Figure, write_figures
from mmllm.report.plots import heat_svg
from mmllm.report.runs import run_curves, write_run_report


def make_run(folder, rate, loss, value):
    (folder / "final").mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"stage": "align", "status": "finished", "seed": 0}))
    (folder / "config.yaml").write_text(f"train: {{learning_rate: {rate}, seed: 0}}\n")
    rows = [{"step": s, "phase": "p", "loss": loss / s, "learning_rate": rate, "logit_scale": 14.0} for s in (1, 2, 3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"step": 4, "lo')
    write_figures(
        folder / "final" / "results.json", "x", 0, None, [], [Figure("retrieval_r1", value, low=0.1, high=0.9)]
    )
    Image.new("RGB", (8, 8), "red").save(folder / "a.png")
    found = nearest_page("names", torch.eye(3), ["cat", "dog", "owl"], [0, 1, 2], [str(folder / "a.png")] * 3, "image")
    (folder / "final" / "nearest.json").write_text(json.dumps([found]))
    return folder


def test_one_run(tmp_path):
    run = make_run(tmp_path / "a", 1e-3, 2.0, 0.5)
    assert run_curves(run)["p", "loss"] == [(1, 2.0), (2, 1.0), (3, 2 / 3)]
    html = write_run_report([run], tmp_path / "page.html").read_text()
    for text in ("learning_rate", "logit_scale", "retrieval_r1", "50.0", "data:image/jpeg;base64", "owl", "✓"):
        assert text in html
    assert "http" not in html.replace("http://www.w3.org", "")


def test_two_runs_side_by_side(tmp_path, capsys):
    a, b = make_run(tmp_path / "x" / "one", 1e-3, 2.0, 0.5), make_run(tmp_path / "x" / "two", 2e-3, 3.0, 0.6)
    with pytest.raises(SystemExit) as end:
        main(["report", str(a), str(b)])
    assert end.value.code == 0
    html = (a / "comparison.html").read_text()
    assert "train.learning_rate" in html and "train.seed" not in html
    assert "50.0" in html and "60.0" in html and html.count("<polyline") == 6


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(UserError, match="run.json"):
        write_run_report([tmp_path], tmp_path / "page.html")


def test_nearest_marks_the_right_one():
    sim = torch.tensor([[0.1, 0.9, 0.3], [0.8, 0.2, 0.5]])
    found = nearest_page("n", sim, ["a", "b", "c"], [1, 2], ["x", "y"], "audio", top=2)
    by_truth = {q["truth"]: q["nearest"] for q in found["queries"]}
    assert by_truth["b"] == [["b", 0.9, True], ["c", 0.3, False]]
    assert by_truth["c"] == [["a", 0.8, False], ["c", 0.5, True]]
    names, values = found["heat"]["rows"], found["heat"]["values"]
    assert sorted(names) == ["b", "c"] and values[names.index("b")][names.index("b")] == 0.9


def test_a_heat_map_has_a_cell_per_pair_and_no_division_by_zero():
    assert heat_svg(["a"], ["b", "c"], [[1.0, 1.0]]).count("<rect") == 2
    assert heat_svg([], [], []) == ""
