"""`mmllm reproduce`: runs an experiment of the project again and writes its report."""

from __future__ import annotations

from pathlib import Path

import click


@click.group("reproduce")
def command() -> None:
    """Run an experiment and write its report, with controls, intervals and what it could have noticed."""


@command.command("hallucination")
@click.option("--smoke", is_flag=True, help="One training seed and few pictures: under 20 minutes on two CPU cores.")
@click.option("--seeds", type=click.IntRange(1), help="Training seeds; default 1 with --smoke, else 3.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/hallucination"), show_default=True,
              help="Keeps finished stages; the same command goes on where it was stopped.")  # fmt: skip
@click.option("--docs", type=click.Path(path_type=Path), default=Path("docs"), show_default=True,
              help="Folder for hallucination.md and hallucination.json.")  # fmt: skip
@click.option("--offline", is_flag=True, help="Use only what the cache holds.")
def hallucination(smoke: bool, seeds: int | None, out: Path, docs: Path, offline: bool) -> None:
    """Does a decoding method reduce hallucination in a small model with a planted prior?"""
    from mmllm.reproduce.hallucination.run import reproduce

    size = "smoke" if smoke else "full"
    line = " ".join(["mmllm reproduce hallucination", *(["--smoke"] if smoke else []),
                     *([f"--seeds {seeds}"] if seeds else [])])  # fmt: skip
    click.echo(f"report: {reproduce(size, seeds, out, docs, offline, line)}")
