"""`mmllm eval`: measures a model on a dataset's held-out part, with intervals, chance and controls."""

from __future__ import annotations

import sys
from pathlib import Path

import click

ALL = "pope,caption,side,box,interleaved,hear,retrieval"


@click.command("eval")
@click.option("--model", type=click.Path(path_type=Path), help="Run folder (or model folder) of a tuned model.")
@click.option("--align", type=click.Path(path_type=Path), help="Align run, for the task retrieval.")
@click.option(
    "--data", default="starter:full", show_default=True, help="Dataset folder, or starter:full, starter:fast."
)
@click.option("--tasks", help=f"Comma-separated; default: all that the given runs can answer, of {ALL}.")
@click.option(
    "--decode",
    default="greedy",
    show_default=True,
    help="Any method as NAME:KEY=VALUE,... or @FILE; see mmllm decode list.",
)
@click.option("--limit", type=click.IntRange(1), help="Most scenes, sounds or pictures per task and split.")
@click.option(
    "--shuffled/--no-shuffled", default=True, show_default=True, help="Ask also about shuffled media (control)."
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Folder for results.json and predictions.jsonl.")
def command(
    model: Path | None,
    align: Path | None,
    data: str,
    tasks: str | None,
    decode: str,
    limit: int | None,
    shuffled: bool,
    seed: int,
    out: Path | None,
) -> None:
    """Measure a model, with a 95 % interval, chance and a shuffled-media control beside every figure."""
    from mmllm.errors import UserError
    from mmllm.evaluate.run import run_eval
    from mmllm.report.figures import print_figures

    if model is None and align is None:
        raise UserError("nothing to measure", do="give --model RUN, --align RUN or both")
    wanted = [t.strip() for t in tasks.split(",") if t.strip()] if tasks is not None else ALL.split(",")
    if tasks is None:
        wanted = [t for t in wanted if (align if t == "retrieval" else model) is not None]
    line = " ".join(["mmllm", *sys.argv[1:]])
    figures = run_eval(model, data, wanted, decode, limit, out, shuffled, align, seed, command=line)
    print_figures(figures, f"{model or align} on {data}, decoded {decode}")
