"""The doctor on machines that lack something: real programs, a path without them, an empty cache."""

import json
import os
import subprocess
import sys
from importlib import util

import pytest

from mmllm.starter import doctor


@pytest.fixture
def bare_path(tmp_path, monkeypatch):
    """A PATH that holds nothing, and a cache that holds nothing."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("MMLLM_CACHE", str(tmp_path / "cache"))


def report():
    done = subprocess.run(
        [sys.executable, "-m", "mmllm.cli", "doctor", "--json"], capture_output=True, text=True, env=os.environ
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    return {c["name"]: c for c in found["checks"]}, found["runs"]


def test_without_npm_and_apt_the_quickstart_runs_with_less(bare_path):
    checks, runs = report()
    assert checks["npm"]["state"] == checks["apt-get"]["state"] == "missing"
    assert checks["pip"]["state"] == "ok"
    assert checks["starter data"]["state"] == "limited" and "fluent" in checks["starter data"]["means"]
    assert runs["quickstart"].startswith("yes") and runs["data build"].startswith("yes, without")


def test_without_vllm_only_serving_is_missing(monkeypatch):
    find = util.find_spec
    monkeypatch.setattr(doctor.util, "find_spec", lambda name, *a: None if name == "vllm" else find(name, *a))
    checks = doctor.examine()
    vllm = next(c for c in checks if c.name == "vllm")
    assert vllm.state == "missing" and "install_vllm_cpu.sh" in vllm.get
    runs = doctor.abilities(checks)
    assert runs["serve"].startswith("no") and runs["align, pretrain, chat, eval"] == runs["tune"] == "yes"
    assert "without the part that serves" in runs["quickstart"]
