"""`mmllm reproduce`: runs a method's effect, or an experiment of the project, again and writes its report."""

from __future__ import annotations

from pathlib import Path

import click


class Experiments(click.Group):
    """Its own commands, and one for each method of the library."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*super().list_commands(ctx), *_slugs()]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return super().get_command(ctx, cmd_name) or _effect(cmd_name)

    def resolve_command(self, ctx: click.Context, args: list[str]):
        if args and args[0] not in super().list_commands(ctx) and not args[0].startswith("-"):
            from mmllm.methods import card

            card(args[0])  # raises UserError with the nearest name
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([("hallucination", "Does decoding reduce hallucination? With a planted prior."),
                                ("starter", "What each part of the starter's recipe is worth."),
                                ("SLUG", "One method's effect; see mmllm methods list.")])  # fmt: skip


def _slugs() -> list[str]:
    from mmllm.methods import cards

    return [c.slug for c in cards()]


def _options(function):
    for option in reversed([
        click.option("--seeds", type=click.IntRange(2), help="How many; default: what the effect's config says."),
        click.option("--first-seed", type=click.IntRange(0), default=0, show_default=True),
        click.option("--quick", is_flag=True, help="Two seeds and short runs; its verdicts do not count."),
        click.option("--full", is_flag=True, help="More data and steps, where the effect's config has a full size."),
        click.option("--jobs", type=click.IntRange(1), help="Runs side by side; default: one for each core."),
        click.option("--out", type=click.Path(path_type=Path), default=Path("runs/effects"), show_default=True,
                     help="Keeps finished runs; the same command goes on where it was stopped."),
        click.option("--docs", type=click.Path(path_type=Path), default=Path("docs"), show_default=True,
                     help="Folder for effects.md, effects.json and effects.svg."),
        click.option("--offline", is_flag=True, help="Use only what the cache holds."),
    ]):  # fmt: skip
        function = option(function)
    return function


@click.group("reproduce", cls=Experiments, invoke_without_command=True)
@click.option("--shelf", type=int, help="All methods of a shelf of the library, such as 1.")
@_options
@click.pass_context
def command(ctx: click.Context, shelf: int | None, **options) -> None:
    """Run an experiment and write its report, with controls, intervals and what it could have noticed."""
    if ctx.invoked_subcommand is not None:
        return
    if shelf is None:
        click.echo(ctx.get_help())
        return
    from mmllm.errors import UserError
    from mmllm.methods import cards

    slugs = [c.slug for c in cards() if c.shelf == shelf]
    if not slugs:
        raise UserError(f"no shelf {shelf}", do=f"there are: {', '.join(sorted({str(c.shelf) for c in cards()}))}")
    _run(slugs, f"mmllm reproduce --shelf {shelf}", **options)


def _effect(slug: str) -> click.Command:
    @click.command(slug, help=f"The effect of {slug}: its arms, their difference and the verdict.")
    @_options
    def run(**options) -> None:
        _run([slug], f"mmllm reproduce {slug}", **options)

    return run


def _run(slugs: list[str], line: str, seeds, first_seed, quick, full, jobs, out, docs, offline) -> None:
    from mmllm.errors import UserError
    from mmllm.report.figures import print_table
    from mmllm.reproduce.effects.page import table_rows, write_pages
    from mmllm.reproduce.effects.run import run_effects

    if quick and full:
        raise UserError("--quick and --full together", do="give one of them")
    size = "quick" if quick else "full" if full else "normal"
    line += "" if size == "normal" else f" --{size}"

    def show(result) -> None:
        title = f"{result.slug}: {result.config.metric}" + (" (quick: no verdict counts)" if quick else "")
        print_table(("arm", "mean", "95 % interval", ""), table_rows(result), title)
        write_pages([result], docs, size, line)

    results = run_effects(slugs, out, size, seeds, first_seed, jobs, offline, show)
    click.echo(f"report: {write_pages(results, docs, size, line)}")


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


@command.command("starter")
@click.option("--seeds", type=click.IntRange(1), help="Training seeds; default: what the config says.")
@click.option("--only", default="", help="Names of arms, with commas; the recipe is always among them.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/ablation"), show_default=True,
              help="Keeps finished runs; the same command goes on where it was stopped.")  # fmt: skip
@click.option("--docs", type=click.Path(path_type=Path), default=Path("docs"), show_default=True,
              help="Folder with starter.md, in which the table is written.")  # fmt: skip
@click.option("--offline", is_flag=True, help="Use only what the cache holds.")
def starter(seeds: int | None, only: str, out: Path, docs: Path, offline: bool) -> None:
    """What is each part of the starter's recipe worth? Equal budgets, paired seeds (configs/starter/ablation.yaml)."""
    from mmllm.reproduce.ablation import reproduce

    arms = [x.strip() for x in only.split(",") if x.strip()]
    line = " ".join(["mmllm reproduce starter", *([f"--seeds {seeds}"] if seeds else []),
                     *([f"--only {only}"] if arms else [])])  # fmt: skip
    click.echo(f"report: {reproduce(out, docs, seeds, arms, offline, line)}")
