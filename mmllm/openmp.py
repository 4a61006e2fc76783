"""How many cores there are, and how OpenMP's threads wait for work.

The latter must be said before torch is imported, so this imports nothing heavy.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

SPIN = "5000"  # turns, some tens of microseconds: a training step has thousands of short parallel pieces


def short_waits() -> None:
    """Lets waiting threads spin for a moment and then sleep; what the user has set stays.

    Threads that sleep at once must be woken for each small operation, which slows small batches down (compare what
    ``mmllm tune configs/starter/tune.yaml`` says at its end with ``GOMP_SPINCOUNT=0`` and without). Threads that never
    sleep (OpenMP's default for seconds) take the cores from other processes.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN)


def available_cores() -> int:
    """Cores this process may use: its affinity, cut by the container's CPU quota where there is one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()[:2]
        if quota != "max":
            cores = min(cores, max(1, math.floor(int(quota) / int(period))))
    except (OSError, ValueError):
        pass
    return cores
