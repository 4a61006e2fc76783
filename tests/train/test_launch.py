"""Several processes: same result as one, mistakes told once, nothing left running; and the thread count."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from toy_stage import train

from mmllm.openmp import available_cores
from mmllm.train.launch import launch, set_threads

PLAIN = {"noisy": False, "max_steps": 6, "max_grad_norm": 0.5, "save_steps": 3}


def weights(run):
    return load_file(run / "final/model.safetensors")


def same_weights(a, b):
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-6, msg=name)


def toy(out, nproc=2, **options):
    return launch([str(out), json.dumps(options)], nproc, module="toy_stage")


def test_two_processes_train_as_one(tmp_path, toy_env, capfd):
    """Unequal shares (5 and 2 samples): the weighted mean over processes is the mean over all 7."""
    train(tmp_path / "one", PLAIN)
    capfd.readouterr()
    assert toy(tmp_path / "two", early=True, **PLAIN) == 0
    said = capfd.readouterr().out
    assert said.count("What trains") == 1 and "6 steps" in said  # process 1 keeps quiet
    same_weights(weights(tmp_path / "one"), weights(tmp_path / "two"))
    assert len(list((tmp_path / "two/checkpoints/checkpoint-6").glob("rng_state_*"))) == 2


@pytest.mark.slow
def test_two_processes_resume_to_the_same_bits(tmp_path, toy_env):
    assert toy(tmp_path / "whole", save_steps=4) == 0
    assert toy(tmp_path / "killed", save_steps=4, die_in_save=12) == 137
    assert toy(tmp_path / "killed", save_steps=4) == 0
    summary = json.loads((tmp_path / "killed/final/summary.json").read_text())
    assert summary["resumed_from"] == 8
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.slow
def test_accelerate_launch(tmp_path, toy_env):
    train(tmp_path / "one", PLAIN)
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m", "toy_stage"]
    done = subprocess.run([*command, str(tmp_path / "two"), json.dumps(PLAIN)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    same_weights(weights(tmp_path / "one"), weights(tmp_path / "two"))


def test_a_mistake_of_all_processes_is_told_once(tmp_path, toy_env, capfd):
    (tmp_path / "file").write_text("")
    assert toy(tmp_path / "file") == 2
    err = capfd.readouterr().err
    assert err.count("error: ") == 1 and "not a folder" in err


def test_a_mistake_of_one_process_stops_the_others(tmp_path, toy_env, capfd):
    assert toy(tmp_path / "run", fail_rank=1) == 2
    assert "error: toy: this process fails; try another" in capfd.readouterr().err


def test_threads_are_set_explicitly(monkeypatch):
    before = torch.get_num_threads()
    try:
        assert set_threads(1) == 1 == torch.get_num_threads()
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        assert set_threads() == 2 == torch.get_num_threads()
        monkeypatch.delenv("OMP_NUM_THREADS")
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(4 * available_cores()))
        assert set_threads() == 1
        assert os.environ["OMP_WAIT_POLICY"] and os.environ["GOMP_SPINCOUNT"]
    finally:
        torch.set_num_threads(before)
