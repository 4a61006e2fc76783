"""`mmllm quickstart`: the whole road on the starter recipe, ending in a report."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("quickstart")
@click.option("--fast", is_flag=True, help="A twentieth of the size, some 7 minutes; for CI.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/quickstart"), show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--offline", is_flag=True, help="Use only what the cache holds.")
@click.option("--no-serve", is_flag=True, help="Leave out the vLLM check.")
@click.option("--restart", is_flag=True, help="Begin anew instead of going on where an earlier run stopped.")
def command(fast: bool, out: Path, seed: int, offline: bool, no_serve: bool, restart: bool) -> None:
    """Data, align, pretrain, tune, eval, serve: everything real, on two CPU cores, in some 20 minutes.

    Interrupted, the same command goes on where it stopped. Ends with a table in which every figure stands beside its
    control, with report.html and with results.json in the run folder.
    """
    from mmllm.starter.quickstart import quickstart

    size = "fast" if fast else "full"
    quickstart(out=out, size=size, seed=seed, offline=offline, serve=not no_serve, restart=restart)
