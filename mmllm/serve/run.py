"""What `mmllm serve` does: start, tell how to ask, wait, end; or start, compare with our own greedy, end."""

from __future__ import annotations

import shlex
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from mmllm.serve.launch import Server, example


def serve(model: str | Path, *, check: bool = False, out: str | Path | None = None, **settings: Any) -> int:
    """Serves until vLLM ends or the process is told to stop; returns the exit code.

    Args:
        model: run folder or model folder.
        check: compare served answers with our own greedy decoding (in float32) and end.
        out: where ``check`` writes its figures.
        settings: of ``Server``.

    Raises:
        UserError: no vLLM, an unfit folder, a taken port, or vLLM's own error while starting.
    """
    if check:
        settings["dtype"] = "float32"
    last = [-15.0]

    def waiting(seconds: float) -> None:
        if seconds - last[0] >= 15:
            last[0] = seconds
            click.echo(f"starting vLLM ... {seconds:.0f} s (usually half a minute; its output: {server.log})", err=True)

    # A polite kill or a closed terminal must end the workers too, so it takes the same way out as Ctrl-C.
    for name in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(name) != signal.SIG_IGN:  # nohup wants it ignored
            signal.signal(name, _leave)
    server = Server(model, say=waiting, **settings)
    begin = time.monotonic()
    try:
        with server:
            ready = time.monotonic() - begin
            click.echo(
                f"{server.name} answers at {server.url} (vLLM {server.vllm.version}, {server.dtype}, "
                f"ready after {ready:.0f} s)"
            )
            if check:
                return _check(server, out, ready)
            click.echo(
                f"\nTry:\n  {example(server)}\n\nor any OpenAI client with base_url={server.url!r}. Ctrl-C ends it."
            )
            return server.wait()
    except KeyboardInterrupt:
        click.echo("ended", err=True)
        return 0


def _leave(signum: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _check(server: Server, out: str | Path | None, ready: float) -> int:
    from mmllm.serve.check import compare, write_result

    rows = compare(server)
    for r in rows:
        verdict = "same" if r.same else "DIFFERS" if r.our_prompt == r.served_prompt else "DIFFERS (prompt)"
        click.echo(f"  {r.name:<12} {verdict:<8} {len(r.ours)} tokens  {r.text[:60]!r}")
    same = sum(r.same for r in rows)
    click.echo(f"{same} of {len(rows)} answers are token for token those of our own greedy decoding")
    if out:
        write_result(out, rows, _command(), ready)
    return 0 if same == len(rows) else 1


def _command(argv: Sequence[str] | None = None) -> str:
    return shlex.join(["mmllm", *(sys.argv[1:] if argv is None else argv)])
