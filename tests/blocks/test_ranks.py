"""Real processes (gloo) that share a batch have the loss and the parameter gradients of one process with all of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mmllm
from mmllm.blocks.ranks import Ranks

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from rank_losses import losses  # noqa: E402


def run_ranks(folder, size):
    """What each of ``size`` processes found."""
    env = os.environ | {"PYTHONPATH": str(Path(mmllm.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    files = [folder / f"{rank}.pt" for rank in range(size)]
    command = [sys.executable, str(HERE / "rank_losses.py")]
    processes = [
        subprocess.Popen([*command, str(rank), str(size), str(folder / "store"), str(file)], env=env)
        for rank, file in enumerate(files)
    ]
    try:
        assert [p.wait(timeout=120) for p in processes] == [0] * size
    finally:
        for p in processes:
            p.kill()
    return [torch.load(file) for file in files]


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_ranks_share_a_batch_exactly(tmp_path, size):
    alone = losses(Ranks())
    for found in run_ranks(tmp_path, size):
        assert found.keys() == alone.keys()
        for name, values in alone.items():
            assert values["loss"] > 0 and values["logit_scale"] != 0
            for key, value in values.items():
                torch.testing.assert_close(found[name][key], value, rtol=1e-4, atol=1e-6, msg=f"{name}, {key}")


def test_one_process_without_a_group_gets_its_own_tensors_back():
    ranks, x = Ranks(), torch.arange(4.0)
    assert (ranks.rank, ranks.size) == (0, 1)
    ranks.sum(x)
    assert ranks.gather(x) is x and ranks.shift(x) is x and torch.equal(x, torch.arange(4.0))
