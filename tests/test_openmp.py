"""OpenMP's waiting threads: our setting is in place before torch is loaded, and the user's own stays."""

from __future__ import annotations

import os
import subprocess
import sys

from mmllm.openmp import SPIN, short_waits


def test_what_the_user_has_set_stays(monkeypatch):
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    short_waits()
    assert os.environ["GOMP_SPINCOUNT"] == "7" and os.environ["OMP_WAIT_POLICY"] == "passive"
    monkeypatch.delenv("GOMP_SPINCOUNT")
    short_waits()
    assert os.environ["GOMP_SPINCOUNT"] == SPIN


def test_the_command_line_says_it_before_torch_is_loaded():
    code = """
import atexit, os, sys
from mmllm.cli import main as module
seen = []
before = module.short_waits
module.short_waits = lambda: (seen.append("torch" in sys.modules), before())
atexit.register(lambda: print(seen, os.environ["GOMP_SPINCOUNT"]))
module.main(["--version"])
"""
    env = {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == f"[False] {SPIN}", done.stdout + done.stderr
