"""Processes and threads: start the command several times, and say how many CPU threads each may use."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import IO

from mmllm.openmp import available_cores, short_waits


def world_size() -> int:
    """Processes of this training (1 outside a launcher)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process's number, from 0."""
    return int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    """True in the one process that prints and writes."""
    return rank() == 0


def local_processes() -> int:
    """Processes of this training on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def set_threads(threads: int | None = None) -> int:
    """Sets torch's thread count explicitly and returns it.

    None takes ``OMP_NUM_THREADS`` where the user has set it, else the available cores shared between the processes on
    this machine.

    A stage calls this first. On a machine without an accelerator it also joins the processes of a training, since
    accelerate's ``PartialState()`` finds the others there only when told that it is on a CPU.
    """
    short_waits()
    if threads is None:
        set_by_user = os.environ.get("OMP_NUM_THREADS", "")
        threads = int(set_by_user) if set_by_user.isdigit() else max(1, available_cores() // local_processes())
    import torch

    torch.set_num_threads(threads)
    if world_size() > 1 and not torch.accelerator.is_available():
        from accelerate import PartialState

        PartialState(cpu=True)
    return threads


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _stop(processes: Sequence[subprocess.Popen], grace: float = 10.0) -> None:
    """Ends the processes' groups: asks first, kills what has not gone after ``grace`` seconds."""
    for sig in (signal.SIGTERM, signal.SIGKILL):
        for p in processes:
            if p.poll() is None:
                try:
                    os.killpg(p.pid, sig)
                except ProcessLookupError:
                    pass
        deadline = time.monotonic() + grace
        while any(p.poll() is None for p in processes) and time.monotonic() < deadline:
            time.sleep(0.05)


def launch(argv: Sequence[str], nproc: int, module: str = "mmllm.cli") -> int:
    """Runs ``python -m module argv`` in ``nproc`` processes of one machine and returns the exit code.

    Process 0 owns the terminal. What another process says on stderr is shown only when that process fails and
    process 0 has not failed by itself, so a mistake that all processes notice is told once. When one fails, the
    others are stopped.
    """
    short_waits()
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, available_cores() // nproc))
    port = str(_free_port())
    processes: list[subprocess.Popen] = []
    logs: list[IO[bytes] | None] = []
    try:
        for index in range(nproc):
            env = os.environ | {
                "RANK": str(index),
                "LOCAL_RANK": str(index),
                "WORLD_SIZE": str(nproc),
                "LOCAL_WORLD_SIZE": str(nproc),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "OMP_NUM_THREADS": threads,
            }
            log = None if index == 0 else tempfile.TemporaryFile()
            logs.append(log)
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", module, *argv],
                    env=env,
                    stdin=None if index == 0 else subprocess.DEVNULL,
                    stdout=None if index == 0 else subprocess.DEVNULL,
                    stderr=log,
                    start_new_session=True,
                )
            )
        while True:
            codes = [p.poll() for p in processes]
            if all(c == 0 for c in codes):
                return 0
            failed = [i for i, c in enumerate(codes) if c not in (None, 0)]
            if failed:
                break
            time.sleep(0.1)
        # Let process 0 tell its own error first.
        deadline = time.monotonic() + 3.0
        while processes[0].poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        first = 0 if processes[0].poll() not in (None, 0) else failed[0]
        log = logs[first]
        if log is not None:
            log.seek(0)
            sys.stderr.write(f"process {first}:\n{log.read()[-8000:].decode(errors='replace')}")
        code = processes[first].returncode
        return code if code > 0 else 128 - code
    finally:
        _stop(processes)
        for log in logs:
            if log is not None:
                log.close()
