"""How OpenMP's threads wait for work; must be said before torch is imported, so this imports nothing heavy."""

from __future__ import annotations

import os

SPIN = "5000"  # turns, some tens of microseconds: a training step has thousands of short parallel pieces


def short_waits() -> None:
    """Lets waiting threads spin for a moment and then sleep; what the user has set stays.

    Threads that sleep at once must be woken for each small operation, which slows small batches down (compare what
    ``mmllm tune configs/starter/tune.yaml`` says at its end with ``GOMP_SPINCOUNT=0`` and without). Threads that never
    sleep (OpenMP's default for seconds) take the cores from other processes.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN)
