"""Memory that a step frees serves the next one, without new pages; what the user has set stays."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from mmllm.malloc import SET_BY_USER, keep_freed_memory

COUNT = """
import resource
import threading
import torch
from mmllm.malloc import keep_freed_memory
assert keep_freed_memory()
def batch(made):
    made.append(torch.ones(64, 36, 1280))  # 12 MB, made by another thread as a loader's are
def step():
    made = []
    loader = threading.Thread(target=batch, args=(made,))
    loader.start()
    loader.join()
    return [made[0] * 2 for _ in range(6)]
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another libc")
def test_freed_memory_is_used_again():
    env = {k: v for k, v in os.environ.items() if k not in (*SET_BY_USER, "OMP_NUM_THREADS")}
    told = subprocess.run([sys.executable, "-c", COUNT], env=env, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    pages = 10 * 7 * 4 * 64 * 36 * 1280 // 4096
    assert int(told.stdout) < 0.1 * pages  # without it some 70 % on two cores


@pytest.mark.parametrize("name", SET_BY_USER)
def test_the_users_setting_stays(name, monkeypatch):
    monkeypatch.setenv(name, "1")
    assert keep_freed_memory() is False
