"""Options that the training commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click


def training_command(
    name: str, help_text: str, plan: Callable[[str, tuple[str, ...], int], Any] | None = None
) -> Callable[[Callable[..., Any]], click.Command]:
    """Decorator: a command ``mmllm NAME CONFIG [key=value ...] [--out RUN] [--resume] [--nproc N]``.

    The function is called with (config: str, overrides: tuple[str, ...], out: Path | None, resume: bool). With
    ``--nproc N`` above 1 the command starts itself N times instead. ``plan`` adds ``--dry-run``, which calls
    it with (config, overrides, nproc) and starts nothing.
    """

    def wrap(function: Callable[..., Any]) -> click.Command:
        @click.command(name, help=help_text)
        @click.argument("config")
        @click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
        @click.option("--out", type=click.Path(path_type=Path), help="Run folder; default runs/CONFIG-NAME.")
        @click.option("--resume", is_flag=True, help="Go on from the last checkpoint in the run folder.")
        @click.option("--nproc", type=click.IntRange(1), default=1, show_default=True, help="Processes to train with.")
        def command(
            config: str, overrides: tuple[str, ...], out: Path | None, resume: bool, nproc: int, dry_run: bool = False
        ) -> None:
            import os

            if dry_run and plan is not None:
                plan(config, overrides, nproc)
                return
            if nproc > 1 and "WORLD_SIZE" not in os.environ:
                from mmllm.train.launch import launch

                argv = [name, config, *overrides, *(["--out", str(out)] if out else [])]
                argv += ["--resume"] if resume else []
                raise SystemExit(launch(argv, nproc))
            function(config=config, overrides=overrides, out=out, resume=resume)

        if plan is not None:
            about = "Build the run on meta tensors: what trains, memory, sharding checked. Loads and writes nothing."
            command = click.option("--dry-run", is_flag=True, help=about)(command)
        return command

    return wrap
