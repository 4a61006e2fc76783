"""The suite in one command on a tiny model, its files made on first use."""

import json

import pytest
from click.testing import CliRunner
from tiny_mm import tiny_model

from mmllm.errors import UserError
from mmllm.evaluate.suite import TASKS, suite_data


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    net, processor = tiny_model()
    net.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_six_benchmarks_in_one_command(model, made_from, tmp_path, monkeypatch):
    from mmllm.cli.eval import command

    monkeypatch.setenv("MMLLM_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "out"
    args = ["--suite", "starter", "--model", str(model), "--data", str(made_from), "--out", str(out), "--limit", "2"]
    result = CliRunner().invoke(command, [*args, "--blind", "--shuffled", "--always-yes"], catch_exceptions=False)
    assert result.exit_code == 0 and "mme_perception" in result.output
    results = json.loads((out / "results.json").read_text())
    assert list(results["tasks"]) == list(TASKS) and results["control"] == "shuffled+blind+always_yes"
    assert results["styles"]["refcoco"] == "mmllm" and results["styles"]["chair"] == "short"
    figures = {f["name"]: f for f in results["figures"]}
    assert figures["mme_existence"]["controls"]["always_yes"]["value"] == 50
    assert figures["pope_random_accuracy"]["controls"]["always_yes"]["value"] == 0.5
    assert set(figures["refcoco_val_iou50"]["controls"]) == {"shuffled", "blind"}
    page = (out / "report.html").read_text()
    assert "always yes" in page and "data:image/jpeg" in page and all(f"<h2>{t}</h2>" in page for t in TASKS)
    made = list((tmp_path / "cache" / "bench").iterdir())
    assert len(made) == 1 and suite_data(str(made_from)) == made[0] == suite_data(str(made[0]))


def test_a_suite_wants_a_model_and_nothing_else(model):
    from mmllm.cli.eval import command

    for args in (["--suite", "starter"], ["--suite", "starter", "--model", str(model), "--tasks", "pope"]):
        with pytest.raises(UserError, match="suite"):
            CliRunner().invoke(command, args, catch_exceptions=False)
