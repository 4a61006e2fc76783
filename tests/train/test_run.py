"""The run folder: created, resumed and refused rightly, never half-written."""

from __future__ import annotations

import json

import pytest
import yaml

from mmllm.config import StrictModel
from mmllm.errors import UserError
from mmllm.train.run import RunFolder, describe_machine, final_folder, read_info
from mmllm.train.section import TrainSection


class Config(StrictModel):
    data: str = "starter:fast"
    train: TrainSection = TrainSection(max_steps=10)


def open_run(path, resume=False, stage="align", **config):
    return RunFolder.open(path, stage, Config.model_validate(config), resume, seed=3, sources=[{"name": "emoji"}])


def test_new_folder_says_what_it_is(tmp_path):
    run = open_run(tmp_path / "deep/run")
    assert yaml.safe_load((run.path / "config.yaml").read_text())["train"]["max_steps"] == 10
    info = read_info(run.path)
    assert info["stage"] == "align" and info["status"] == "running" and info["seed"] == 3
    assert (
        info["sources"] == [{"name": "emoji"}] and "torch" in info["versions"] and info["machine"] and info["command"]
    )
    assert not run.finished and not run.resumed and run.last_checkpoint() is None


def test_the_dumped_config_runs_again(tmp_path):
    run = open_run(tmp_path / "run", train={"max_steps": 7, "adam_epsilon": 1e-6})
    again = Config.model_validate(yaml.safe_load((run.path / "config.yaml").read_text()))
    assert again.model_dump() == Config.model_validate({"train": {"max_steps": 7, "adam_epsilon": 1e-6}}).model_dump()


def test_a_run_is_not_overwritten_without_resume(tmp_path):
    open_run(tmp_path / "run")
    before = (tmp_path / "run/run.json").read_text()
    with pytest.raises(UserError, match="already holds a run; add --resume"):
        open_run(tmp_path / "run")
    assert (tmp_path / "run/run.json").read_text() == before
    assert open_run(tmp_path / "run", resume=True).resumed


def test_another_stage_is_refused(tmp_path):
    open_run(tmp_path / "run")
    for resume in (False, True):
        with pytest.raises(UserError, match="run of 'align'"):
            open_run(tmp_path / "run", resume, stage="tune")


def test_something_else_is_refused(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("x")
    with pytest.raises(UserError, match="something else"):
        open_run(tmp_path / "mine", resume=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="not a folder"):
        open_run(tmp_path / "file")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_resume_with_another_config_names_the_key(tmp_path):
    open_run(tmp_path / "run")
    with pytest.raises(UserError, match=r"train.learning_rate=0.001, now it is 0.1"):
        open_run(tmp_path / "run", resume=True, train={"max_steps": 10, "learning_rate": 0.1})
    with pytest.raises(UserError, match="data='starter:fast'"):
        open_run(tmp_path / "run", resume=True, data="starter:full")
    free = {"max_steps": 10, "logging_steps": 1, "save_steps": 3, "prefetch": 0}
    assert open_run(tmp_path / "run", resume=True, train=free).resumed


def test_resume_with_another_number_of_processes_is_refused(tmp_path, monkeypatch):
    open_run(tmp_path / "run")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="began with 1 processes, now there are 2; resume with --nproc 1"):
        open_run(tmp_path / "run", resume=True)


def test_resuming_keeps_the_start_and_adds_up_the_time(tmp_path):
    run = open_run(tmp_path / "run")
    started = run.info()["started"]
    run.update(seconds=100.0, started="2020-01-01T00:00:00+0000", llm_dtype="bfloat16")
    again = open_run(tmp_path / "run", resume=True)
    assert again.info()["started"] == "2020-01-01T00:00:00+0000" != started
    assert again.info()["llm_dtype"] == "bfloat16"
    again.update()
    assert again.info()["seconds"] >= 100.0


def test_metrics_survive_a_cut_line_and_forget_what_runs_again(tmp_path):
    run = open_run(tmp_path / "run")
    for step in (1, 2, 3):
        run.log({"step": step, "phase": "a"})
    run.log({"step": 1, "phase": "b"})
    with run.metrics_file.open("a") as f:
        f.write('{"step": 2, "pha')
    assert len(run.read_metrics()) == 4
    run.forget_after(2, "a")
    assert [(r["phase"], r["step"]) for r in run.read_metrics()] == [("a", 1), ("a", 2), ("b", 1)]
    run.log({"step": 9})
    assert all(json.loads(line) for line in run.metrics_file.read_text().splitlines())


def test_last_checkpoint_is_the_highest_complete_one(tmp_path):
    run = open_run(tmp_path / "run")
    for name in ("checkpoint-5", "checkpoint-20", "checkpoint-100.part", "checkpoint-30.old"):
        (run.checkpoints() / name).mkdir()
    assert run.last_checkpoint().name == "checkpoint-20"
    assert run.last_checkpoint("regions") is None
    open_run(tmp_path / "run", resume=True)
    assert not (run.checkpoints() / "checkpoint-100.part").exists()


def test_final_appears_whole_or_not_at_all(tmp_path):
    run = open_run(tmp_path / "run")
    with pytest.raises(RuntimeError), run.final() as folder:
        (folder / "weights").write_text("half")
        raise RuntimeError("disk on fire")
    assert not run.finished and not list(run.path.glob("final*"))
    with pytest.raises(UserError, match="not finished; go on with: mmllm align"):
        final_folder(run.path)
    with run.final() as folder:
        (folder / "weights").write_text("whole")
    assert run.finished and (run.path / "final/weights").read_text() == "whole"
    assert read_info(run.path)["status"] == "finished"
    assert final_folder(run.path, ["align", "tune"]) == run.path / "final"
    with pytest.raises(UserError, match="run of 'align'; give a run of tune"):
        final_folder(run.path, ["tune"])


def test_reading_what_is_no_run(tmp_path):
    with pytest.raises(UserError, match="not a run folder"):
        final_folder(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        final_folder(tmp_path / "none")
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(UserError, match="not a run folder"):
        read_info(tmp_path)


def test_machine_is_one_line():
    assert "cores" in describe_machine() and "\n" not in describe_machine()


def test_the_last_checkpoints_and_the_best_are_kept(tmp_path):
    run = open_run(tmp_path / "run")
    for step, loss in ((1, 0.9), (2, 0.4), (3, 0.4), (4, 0.7), (10, 0.8)):
        folder = run.checkpoints() / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "held_out.json").write_text(json.dumps({"held_out_loss": loss}))
    best = run.best_checkpoint()
    assert best is not None and best.name == "checkpoint-2"
    run.prune(None)
    assert len(run.all_checkpoints()) == 5
    run.prune(2)
    assert [p.name for p in run.all_checkpoints()] == ["checkpoint-2", "checkpoint-4", "checkpoint-10"]
    assert len(list(run.checkpoints().iterdir())) == 3


def test_what_a_kill_leaves_is_cleared_and_no_good_folder_is_lost(tmp_path):
    run = open_run(tmp_path / "run")
    phase = run.checkpoints("regions")
    for folder in ("checkpoint-5.old", "checkpoint-9", "checkpoint-9.old", "checkpoint-12.part"):
        (phase / folder).mkdir(parents=True)
    (phase / "checkpoint-5.old" / "weights").write_text("good")
    open_run(tmp_path / "run", resume=True)
    assert sorted(p.name for p in phase.iterdir()) == ["checkpoint-5", "checkpoint-9"]
    assert (phase / "checkpoint-5" / "weights").read_text() == "good"


def test_a_kill_while_the_folder_is_made_leaves_one_that_can_be_started(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json.part").write_text("{")
    assert not open_run(tmp_path / "run", resume=True).resumed
    (tmp_path / "run" / "config.yaml").unlink()  # killed between the two files
    (tmp_path / "run" / "config.yaml.part").write_text("data: st")
    assert open_run(tmp_path / "run", resume=True).resumed
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["data"] == "starter:fast"


def test_a_log_that_cannot_be_written_is_told_in_one_line(tmp_path):
    run = open_run(tmp_path / "run")
    run.metrics_file.symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"cannot write metrics \(No space left on device\).*make room"):
        run.log({"step": 1})
