"""`mmllm report`: one self-contained page about a run, or comparing several."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("report")
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Default: a page in the first RUN.")
def command(runs: tuple[Path, ...], out: Path | None) -> None:
    """Curves, figures, settings that differ and nearest neighbours of RUNs of align, pretrain or tune.

    A folder of mmllm eval gets its page of bars and wrong answers.
    """
    from mmllm.report.runs import write_run_report

    if len(runs) == 1 and (runs[0] / "results.json").is_file() and (runs[0] / "predictions.jsonl").is_file():
        from mmllm.evaluate.page import write_eval_report

        click.echo(f"report: {write_eval_report(runs[0], out=out)}")
        return
    default = "report.html" if len(runs) == 1 else "comparison.html"
    click.echo(f"report: {write_run_report(runs, out or runs[0] / default)}")
