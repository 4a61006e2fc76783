"""The benchmarks against open_clip at their smallest size: every row is measured, and written in the common form."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mmllm.data.models import resolve_dataset
from mmllm.errors import UserError
from mmllm.report.figures import read_figures

ROOT = Path(__file__).resolve().parents[2]
ROWS = {
    "align_step": {"align_step_vs_open_clip", "align_step_full_context_vs_open_clip", "cached_tower_vs_first_epoch"},
    "loader": {"loader_vs_open_clip", "loader_draft_vs_open_clip"},
}


@pytest.mark.peers
@pytest.mark.parametrize("name", ROWS)
def test_every_row_is_measured_at_the_smoke_size(name, tmp_path):
    pytest.importorskip("open_clip")
    try:
        resolve_dataset("starter:full")
    except UserError as e:
        pytest.skip(str(e))
    file = tmp_path / "figures.json"
    command = [sys.executable, f"benchmarks/{name}.py", "--smoke", "--pairs", "1", "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    figures = {f.name: f for f in read_figures(file)}
    assert set(figures) == ROWS[name]
    for f in figures.values():
        assert f.unit == "ratio" and f.better == "higher" and f.n == 1 and f.value > 0
        assert f.value == pytest.approx(f.arms["ours"] / f.arms["theirs"], rel=0.02)
        assert f.verdict == ("met" if f.value >= f.target else "missed")
