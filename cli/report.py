"""`mmllm report`: one self-contained page about a run, or comparing several."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("report")
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Default: a page in the first RUN.")
def command(runs: tuple[Path, ...], out: Path | None) -> None:
    """Curves, figures, settings that differ and nearest neighbours of the given RUNs of align, pretrain or tune."""
    from mmllm.report.runs import write_run_report

    default = "report.html" if len(runs) == 1 else "comparison.html"
    click.echo(f"report: {write_run_report(runs, out or runs[0] / default)}")
