"""The benchmark of connector training at its smallest size: both sides agree, and every row is measured."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmllm.data.build import build_dataset
from mmllm.report.figures import read_figures

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
ROWS = {
    "tune_vs_padded_trainer", "tune_cached_vs_padded_trainer", "packing_fill", "packing_fill_mixed",
    "packing_plan_share", "matmul_fraction",
}  # fmt: skip


def test_every_row_is_measured_at_the_smoke_size(tmp_path):
    build_dataset("starter.yaml", "fast")
    file = tmp_path / "figures.json"
    command = [sys.executable, "benchmarks/tune_step.py", "--smoke", "--pairs", "1", "--json", str(file)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    figures = {f.name: f for f in read_figures(file)}
    assert set(figures) == ROWS
    for f in figures.values():
        assert f.unit == "ratio" and f.value is not None and f.value > 0 and f.target is not None
        good = f.value >= f.target if f.better == "higher" else f.value <= f.target
        assert f.verdict == ("met" if good else "missed")
    assert 0.8 < figures["packing_fill_mixed"].value <= 1 and figures["matmul_fraction"].value < 1
