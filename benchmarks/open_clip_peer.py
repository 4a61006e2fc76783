"""What the benchmarks against open_clip share: the environment that both sides run in, and peak memory of a process."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OPEN_CLIP = "3.3.0"


def enter() -> None:
    """Runs this command again in the environment of ``scripts/open_clip_env.sh``, unless it runs there already.

    The environment is the folder MMLLM_BENCH_ENV, else ``.bench-venv`` in the checkout.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        here = importlib.metadata.version("open_clip_torch")
    except importlib.metadata.PackageNotFoundError:
        here = None
    if here == OPEN_CLIP:
        return
    place = Path(os.environ.get("MMLLM_BENCH_ENV") or ROOT / ".bench-venv")
    python = place / "bin/python"
    if here is not None or not python.is_file():
        found = f"open_clip {here}" if here else "no open_clip"
        sys.exit(f"error: {found} here, no environment in {place}; make it: sh scripts/open_clip_env.sh {place}")
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    os.execve(python, [str(python), *sys.argv], os.environ | {"PYTHONPATH": path})


def child(arguments: Sequence[str], threads: int, **env: str) -> dict[str, Any]:
    """What this script, called again in a process of its own, prints as JSON on its last line."""
    done = subprocess.run(
        [sys.executable, sys.argv[0], *arguments],
        env=os.environ | {"OMP_NUM_THREADS": str(threads)} | env,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def peak_extra_mb(run: Callable[[], Any]) -> float:
    """Highest resident memory during ``run()`` above that before it, in MiB (Linux)."""
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back to the present
    run()
    return _resident("VmHWM") - before


def _resident(key: str) -> float:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[key].split()[0]) / 1024
