"""A real `mmllm tune`, killed at random moments or out of disk, ends with the bits of the uninterrupted run."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from test_tune import COLOURS, config, moved, turn, weights, world  # noqa: F401

import mmllm

pytestmark = pytest.mark.slow
STEPS, SAVE = 36, 4


@pytest.fixture
def start(world, tmp_path):  # noqa: F811
    """``start(out, *more) -> Popen`` of a run with LoRA, packed rows and a shuffled mixture of three files."""
    for name in ("more", "plain"):
        rows = [
            {"id": f"{name}{i}", "messages": [turn("user", f"Is {c} a colour?"), turn("assistant", "yes " * (1 + i))]}
            for i, c in enumerate(COLOURS)
        ]
        (world / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    settings = config(
        world, data=["train.jsonl", "more.jsonl"], replay={"data": "plain.jsonl", "weight": 0.2}, pack=256,
        max_length=200, lora={"r": 2, "dropout": 0.1}, held_out={"data": "train.jsonl", "limit": 8},
        train={"llm": "lora", "max_steps": STEPS, "save_steps": SAVE, "per_device_train_batch_size": 1,
               "save_total_limit": 2},
    )  # fmt: skip
    file = tmp_path / "tune.yaml"
    file.write_text(yaml.safe_dump(settings.model_dump(mode="json", exclude_none=True)))
    env = os.environ | {"MMLLM_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = str(Path(mmllm.__file__).parents[1])
    running = []

    def begin(out: Path, *more: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "mmllm.cli", "tune", str(file), "--out", str(out), *more]
        running.append(subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True))
        return running[-1]

    yield begin
    for process in running:
        if process.poll() is None:
            process.kill()
        process.communicate()


def complete(process: subprocess.Popen) -> None:
    errors = process.communicate(timeout=300)[1]
    assert process.returncode == 0, errors[-2000:]


def steps(run: Path) -> list[int]:
    """Steps of the log, as far as it is written."""
    found = []
    for line in (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if "loss" in row:
            found.append(row["step"])
    return found


def checkpoints(run: Path) -> list[str]:
    return sorted((p.name for p in (run / "checkpoints").glob("*")), key=lambda n: int(n.split("-")[1].split(".")[0]))


def kill_when(process: subprocess.Popen, ready, pause: float = 0.0, look: float = 0.002) -> None:
    deadline = time.monotonic() + 240
    while not ready():
        assert process.poll() is None, f"ended before it was killed: {process.communicate()[1][-2000:]}"
        assert time.monotonic() < deadline
        time.sleep(look)
    time.sleep(pause)
    process.kill()
    assert process.wait() == -signal.SIGKILL


def equal(one: Path, two: Path) -> None:
    """The models, the state of the optimizer and what was logged."""
    assert moved(weights(one), weights(two)) == set()
    last = [run / "checkpoints" / f"checkpoint-{STEPS}" for run in (one, two)]
    assert (last[0] / "model.safetensors").read_bytes() == (last[1] / "model.safetensors").read_bytes()
    moments = [torch.load(p / "optimizer.pt", weights_only=True)["state"] for p in last]
    assert moments[0].keys() == moments[1].keys()
    for i, state in moments[0].items():
        assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(moments[1][i][k])) for k, v in state.items()), i
    rows = [[json.loads(x) for x in (r / "metrics.jsonl").read_text().splitlines()] for r in (one, two)]
    plain = [[{k: v for k, v in r.items() if "second" not in k and k != "train_runtime"} for r in x] for x in rows]
    assert [r for r in plain[0] if "loss" in r] == [r for r in plain[1] if "loss" in r]


def test_killed_at_five_random_moments_it_ends_with_the_same_bits(start, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    complete(start(whole))
    draw = random.Random(7)
    moments = sorted(draw.sample(range(2, STEPS - 6), 4))
    process = start(cut)
    for moment in moments:  # in the middle of whatever it does after that step
        kill_when(process, lambda m=moment: (steps(cut) or [0])[-1] >= m, draw.random() * 0.05)
        assert not (cut / "final").exists()
        process = start(cut, "--resume")
    # and while a checkpoint is being written
    part = cut / "checkpoints"
    kill_when(process, lambda: any(n.endswith(".part") and "checkpoint-" in n for n in os.listdir(part)), look=0.0)
    left = checkpoints(cut)
    assert any(n.endswith(".part") for n in left), left
    assert not (cut / "final").exists()
    complete(start(cut, "--resume"))
    assert not [p for p in cut.rglob("*.part")]
    equal(whole, cut)


@pytest.mark.mounts
def test_a_full_disk_costs_no_checkpoint_and_with_room_it_goes_on_to_the_same_bits(start, tmp_path):
    whole, disk = tmp_path / "whole", tmp_path / "disk"
    complete(start(whole))
    size = sum(f.stat().st_size for f in (whole / "checkpoints" / f"checkpoint-{STEPS}").iterdir()) // 1024
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={int(size * 2.5)}k", "tmpfs", str(disk)]  # two stay, a third is made
    subprocess.run(mount, check=True)
    try:
        run = disk / "run"
        process = start(run)
        errors = process.communicate(timeout=300)[1]
        assert process.returncode == 2 and "make room, then go on with --resume" in errors, errors[-2000:]
        assert "Traceback" not in errors
        assert checkpoints(run) == [f"checkpoint-{SAVE}", f"checkpoint-{2 * SAVE}"]
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        complete(start(run, "--resume"))
        equal(whole, run)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
