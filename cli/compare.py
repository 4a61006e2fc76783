"""`mmllm compare`: says of two evaluated runs whether they differ by more than noise."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import click


@click.command("compare")
@click.argument("run_a", type=click.Path(path_type=Path))
@click.argument("run_b", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="JSON file for the figures.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the resamples and sign flips.")
def command(run_a: Path, run_b: Path, out: Path | None, seed: int) -> None:
    """Compare two evaluated runs item by item and say which differences are more than noise.

    RUN_A and RUN_B are run folders with eval/predictions.jsonl, evaluation folders, or predictions.jsonl files.
    """
    from mmllm.evaluate.compare import COLUMNS, compare_runs, table_rows, write_comparison
    from mmllm.report.figures import print_table

    found = compare_runs(run_a, run_b, seed)
    print_table(COLUMNS, table_rows(found.lines), f"A = {run_a}, B = {run_b}")
    for note in found.notes:
        click.echo(note)
    if out is not None:
        write_comparison(out, found, shlex.join(["mmllm", *sys.argv[1:]]), seed)
        click.echo(f"figures: {out}")
