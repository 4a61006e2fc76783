"""Two real processes (gloo) that share a batch take the step of one process with all of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

import mmllm
from mmllm.blocks.ranks import Ranks

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from rank_step import CASES, found  # noqa: E402


def test_two_processes_take_the_step_of_one(tmp_path):
    env = os.environ | {"PYTHONPATH": str(Path(mmllm.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    files = [tmp_path / f"{rank}.pt" for rank in range(2)]
    command = [sys.executable, str(HERE / "rank_step.py")]
    processes = [
        subprocess.Popen([*command, str(rank), "2", str(tmp_path / "store"), str(file)], env=env)
        for rank, file in enumerate(files)
    ]
    try:
        assert [p.wait(timeout=120) for p in processes] == [0, 0]
    finally:
        for p in processes:
            p.kill()
    for number, case in enumerate(CASES):
        alone = found(Ranks(), case)
        if case != "qformer":  # it has a temperature of its own, and words that do not train
            assert "model.logit_scale.image:text" in alone and any(".text." in name for name in alone)
        for file in files:
            shared = torch.load(file)[number]
            assert shared.keys() >= alone.keys()  # averaging makes zeros of missing gradients
            for name, value in alone.items():
                torch.testing.assert_close(shared[name], value, rtol=1e-4, atol=1e-6, msg=f"{case}, {name}")
