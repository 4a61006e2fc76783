"""Starts the toy stage in real processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # so that tests and their child processes find toy_stage


@pytest.fixture
def toy_env(monkeypatch) -> None:
    """The environment in which child processes find toy_stage and mmllm."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), str(HERE.parents[1])]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def start_toy(toy_env):
    """``start_toy(out, **options) -> Popen`` of a real training process."""
    started = []

    def start(out, **options) -> subprocess.Popen:
        command = [sys.executable, "-m", "toy_stage", str(out), json.dumps(options)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()
