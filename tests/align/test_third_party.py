"""An objective of somebody else's package: installed by pip, found by its entry point, trained with by the command."""

from __future__ import annotations

import os
import subprocess
import sys

import yaml

CODE = """
from mmllm.contracts import Objective
from mmllm.registry import register


@register("objective", "their_distance")
class TheirDistance(Objective):
    def __init__(self, pair):
        super().__init__()
        self.first, self.second = pair
        self.needs = frozenset(f"{s}.embedding" for s in pair)

    def forward(self, batch):
        a, b = (batch.streams[s].embedding for s in (self.first, self.second))
        return {"loss": (a - b).pow(2).sum(-1)}
"""
PROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "their-objectives"
version = "1.0"
[project.entry-points."mmllm.plugins"]
theirs = "their_objectives"
[tool.setuptools]
py-modules = ["their_objectives"]
"""


def test_an_installed_package_brings_an_objective(settings, tmp_path):
    package = tmp_path / "package"
    package.mkdir()
    (package / "their_objectives.py").write_text(CODE)
    (package / "pyproject.toml").write_text(PROJECT)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(tmp_path / "site"), str(package)], check=True)
    phase = settings["phases"]["both"]
    phase["objectives"] = [{"type": "their_distance", "sources": ["things"], "options": {"pair": ["image", "text"]}}]
    phase |= {"sources": {"things": phase["sources"]["things"]}, "trains": ["image", "text.head"]}
    phase["train"] = {"max_steps": 10, "logging_steps": 5}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings | {"phases": {"both": phase}, "measures": {}}))
    env = os.environ | {"MMLLM_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(tmp_path / "site"), env.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "mmllm.cli", "align", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "their_distance:image:text" in (tmp_path / "run" / "metrics.jsonl").read_text()
