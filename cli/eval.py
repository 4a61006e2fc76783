"""`mmllm eval`: measures a model on a dataset's held-out part, or on benchmarks in their official layout."""

from __future__ import annotations

import sys
from pathlib import Path

import click

ALL = "pope,caption,side,box,interleaved,hear,retrieval"


@click.command("eval")
@click.option("--model", type=click.Path(path_type=Path), help="Run folder (or model folder) of a tuned model.")
@click.option("--align", type=click.Path(path_type=Path), help="Align run, for retrieval, caption benchmarks, ESC-50.")
@click.option(
    "--data",
    help="Default starter:full. Dataset folder, starter:full, starter:fast, or a folder with the files of benchmarks.",
)
@click.option(
    "--tasks",
    help=f"Comma-separated: benchmarks (see --list), or of {ALL}, by default all that the given runs can answer.",
)
@click.option("--style", help="Prompt and parser of benchmarks: official, llava, lmms, ...; default: each one's first.")
@click.option("--list", "listing", is_flag=True, help="Name the benchmarks, their styles and the files they need.")
@click.option(
    "--decode",
    "decodes",
    multiple=True,
    default=("greedy",),
    show_default=True,
    help="Any method as NAME:KEY=VALUE,... or @FILE; see mmllm decode list. Given several times, each has its folder.",
)
@click.option("--limit", type=click.IntRange(1), help="Most scenes, sounds or pictures per task and split.")
@click.option(
    "--shuffled/--no-shuffled", default=None, help="Control: the same questions about other media; on unless --blind."
)
@click.option(
    "--margins/--no-margins", default=True, show_default=True, help="Benchmarks: also score the choices, for the AUC."
)
@click.option("--blind", is_flag=True, help="Control: no media; a run's margins are judged by it.")
@click.option("--always-yes", is_flag=True, help="Benchmarks: a control that answers every yes/no question with yes.")
@click.option("--suite", type=click.Choice(["starter"]), help="Six benchmarks made here, in one go; needs --model.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--nproc", type=click.IntRange(1), default=1, show_default=True, help="Processes that share the work.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for results.json and predictions.jsonl.")
def command(
    model: Path | None,
    align: Path | None,
    data: str | None,
    tasks: str | None,
    style: str | None,
    listing: bool,
    decodes: tuple[str, ...],
    limit: int | None,
    shuffled: bool | None,
    margins: bool,
    blind: bool,
    always_yes: bool,
    suite: str | None,
    seed: int,
    nproc: int,
    out: Path | None,
) -> None:
    """Measure a model, with a 95 % interval, chance and a shuffled-media control beside every figure."""
    from mmllm.errors import UserError
    from mmllm.report.figures import print_figures, print_table

    if listing:
        from mmllm.evaluate.benchmarks.select import COLUMNS, benchmark_rows

        print_table(COLUMNS, benchmark_rows())
        return
    from mmllm.evaluate.benchmarks.select import are_benchmarks

    asked = {"shuffled": not blind if shuffled is None else shuffled, "blind": blind, "always_yes": always_yes}
    control = [name for name, on in asked.items() if on]
    decode = decodes[0]

    def one_by_one() -> None:
        if nproc > 1:
            raise UserError("benchmarks are asked by one process", "--nproc", "leave it out")
        if len(decodes) > 1:
            raise UserError("benchmarks are decoded by one method", "--decode", "give it once")

    if suite is not None:
        one_by_one()
        from mmllm.evaluate.suite import run_suite

        given = {"--align": align, "--tasks": tasks, "--style": style}
        if model is None or any(x is not None for x in given.values()):
            what = next((name for name, x in given.items() if x is not None), "--model")
            raise UserError("a suite names its own tasks and styles" if model else "a suite needs a model", what)
        line = " ".join(["mmllm", *sys.argv[1:]])
        figures = run_suite(model, data, decode, limit, out, control, seed, margins, command=line)
        print_figures(figures, f"{model} on the suite {suite}, decoded {decode}")
        return
    data = data or "starter:full"
    wanted = [t.strip() for t in (ALL if tasks is None else tasks).split(",") if t.strip()]
    line = " ".join(["mmllm", *sys.argv[1:]])
    if tasks is not None and are_benchmarks(wanted, data, style):
        from mmllm.evaluate.benchmarks.runner import run_benchmarks

        one_by_one()
        if (model is None) == (align is None):
            what = "nothing to measure" if model is None else "a model and an align run at once"
            raise UserError(what, do="give --model RUN for questions, or --align RUN for retrieval")
        if align is not None:
            from mmllm.evaluate.benchmarks.aligned import run_aligned

            print_figures(run_aligned(align, data, wanted, limit, out, seed, line), f"{align} on {data}")
            return
        figures = run_benchmarks(model, data, wanted, style, decode, limit, out, control, seed, margins, command=line)
        print_figures(figures, f"{model} on {data} in style {style or 'default'}, decoded {decode}")
        return
    from mmllm.evaluate.run import run_evals

    if model is None and align is None:
        raise UserError("nothing to measure", do="give --model RUN, --align RUN or both")
    if style is not None or always_yes:
        option = "--style" if style is not None else "--always-yes"
        raise UserError("this is for benchmarks", option, "leave it out, or name benchmarks: mmllm eval --list")
    if tasks is None:
        wanted = [t for t in wanted if (align if t == "retrieval" else model) is not None]
    found = run_evals(
        model, data, wanted, decodes, limit, out, asked["shuffled"], align, seed, command=line, blind=blind, nproc=nproc
    )
    for spec, figures in found.items():
        print_figures(figures, f"{model or align} on {data}, decoded {spec}")
