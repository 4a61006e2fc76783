"""A finished stage is never redone, a killed one is; an arm's steps start from each other and are kept apart by key."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mmllm.reproduce.arms import Arm, Step, train_arm
from mmllm.reproduce.ledger import Ledger, content_hash, seconds

KILLED = """
import os, signal, sys
from pathlib import Path
from mmllm.reproduce.ledger import Ledger

def make(folder):
    (folder / "half").write_text("x")
    os.kill(os.getpid(), signal.SIGKILL)

Ledger(sys.argv[1]).stage("a", {"n": 1}, make)
"""


def test_a_finished_stage_is_not_made_again(tmp_path: Path) -> None:
    ledger, calls = Ledger(tmp_path), []
    for n in (1, 1, 2, 1):
        folder = ledger.stage("a", {"n": n}, lambda f, n=n: (calls.append(n), (f / "out").write_text(str(n)))[0])
        assert (folder / "out").read_text() == str(n)
    assert calls == [1, 2]
    assert ledger.finished("a", {"n": 1}) and not ledger.finished("a", {"n": 3})
    assert seconds(folder) > 0


def test_the_key_is_its_content() -> None:
    assert content_hash({"a": 1, "b": [2]}) == content_hash({"b": [2], "a": 1}) != content_hash({"a": 1, "b": [3]})


def test_a_killed_stage_is_made_again_and_finds_what_it_left(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)])
    assert done.returncode == -signal.SIGKILL
    ledger, found = Ledger(tmp_path), []
    assert not ledger.finished("a", {"n": 1})
    ledger.stage("a", {"n": 1}, lambda folder: found.extend(p.name for p in folder.iterdir()))
    assert found == ["half"] and ledger.finished("a", {"n": 1})


def test_a_failing_stage_is_not_finished_and_its_time_counts(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)

    def fail(folder: Path) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        ledger.stage("a", {}, fail)
    assert not ledger.finished("a", {})
    first = seconds(ledger.folder("a", {}))
    ledger.stage("a", {}, lambda folder: None)
    assert ledger.finished("a", {}) and seconds(ledger.folder("a", {})) >= first > 0


def test_an_arms_steps_follow_each_other_and_run_once(tmp_path: Path) -> None:
    ran: list[tuple[str, list[str]]] = []

    def command(step: Step, overrides: list[str], out: Path) -> None:
        ran.append((step.command, list(overrides)))
        out.mkdir()

    steps = (
        Step("align", "configs/effects/hallucination_align.yaml", ("train.learning_rate=0.1",)),
        Step("tune", "configs/effects/hallucination_tune.yaml"),
    )
    ledger, data = Ledger(tmp_path), tmp_path / "data"
    runs = train_arm(Arm("model", steps), 3, data, ledger, {"plan": 1}, command)
    assert [c for c, _ in ran] == ["align", "tune"]
    assert ran[0][1] == [f"dataset={data}", "train.seed=3", "train.learning_rate=0.1"]
    assert ran[1][1][-1] == f"init={runs[0]}"
    assert train_arm(Arm("model", steps), 3, data, ledger, {"plan": 1}, command) == runs and len(ran) == 2
    # Another last step leaves the first one as it is; another seed or other data change both.
    longer = (steps[0], Step("tune", steps[1].config, ("train.max_steps=2",)))
    again = train_arm(Arm("model", longer), 3, data, ledger, {"plan": 1}, command)
    assert again[0] == runs[0] and again[1] != runs[1] and len(ran) == 3
    train_arm(Arm("model", steps), 4, data, ledger, {"plan": 1}, command)
    train_arm(Arm("model", steps), 3, data, ledger, {"plan": 2}, command)
    assert len(ran) == 7


def test_an_unfinished_step_is_run_again_in_the_same_folder(tmp_path: Path) -> None:
    tries: list[Path] = []

    def command(step: Step, overrides: list[str], out: Path) -> None:
        tries.append(out)
        out.mkdir(exist_ok=True)
        if len(tries) == 1:
            raise KeyboardInterrupt

    arm = Arm("model", (Step("tune", "configs/effects/hallucination_tune.yaml"),))
    with pytest.raises(KeyboardInterrupt):
        train_arm(arm, 0, tmp_path, Ledger(tmp_path), {}, command)
    train_arm(arm, 0, tmp_path, Ledger(tmp_path), {}, command)
    assert len(tries) == 2 and tries[0] == tries[1]
    done = json.loads((tries[0].parent / "done.json").read_text())
    assert done["name"] == "model-seed0-tune" and os.path.isdir(tries[0])
