"""`mmllm data`: build, check and preview datasets, and list the licences of what they are made from."""

from __future__ import annotations

from pathlib import Path

import click


@click.group("data", help="Build, check and preview data.")
def command() -> None:
    pass


@command.command("build")
@click.argument("recipe", default="starter.yaml")
@click.option("--size", default="full", show_default=True, help="One of the recipe's sizes.")
@click.option("--out", type=click.Path(path_type=Path), help="Dataset folder; default in the cache.")
@click.option("--offline", is_flag=True, help="Use cached sources only.")
@click.option("--workers", type=click.IntRange(1), default=2, show_default=True, help="Processes.")
@click.option("--force", is_flag=True, help="Build again even if nothing changed.")
def build(recipe: str, size: str, out: Path | None, offline: bool, workers: int, force: bool) -> None:
    """Fetch a recipe's sources and build its dataset folder."""
    from mmllm.data.build import build_dataset

    click.echo(build_dataset(recipe, size, out, offline, workers, force))


@command.command("fetch")
@click.argument("recipe", default="starter.yaml")
@click.option("--offline", is_flag=True, help="Touch no network: say what the cache holds and what is missing.")
def fetch(recipe: str, offline: bool) -> None:
    """Fetch a recipe's sources and models into the cache, each checked by sha256."""
    from mmllm.data.models import fetch_all

    used, missing = fetch_all(recipe, offline)
    click.echo(f"{len(used)} sources ready: {', '.join(used)}")
    if missing:
        click.echo(f"missing: {', '.join(missing)}")


@command.command("check")
@click.argument("file")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--limit", type=click.IntRange(1), help="Look at the first N records only.")
@click.option("--needs", default="", help="Fields that every record must have: image,text.")
@click.option("--text-limit", type=click.IntRange(1), help="Longest text, in words; a config's towers know theirs.")
@click.option("--column", "columns", multiple=True, metavar="FIELD=COLUMN", help="Which column is which field.")
def check(
    file: str,
    overrides: tuple[str, ...],
    limit: int | None,
    needs: str,
    text_limit: int | None,
    columns: tuple[str, ...],
) -> None:
    """Look at every record and say what is wrong, with file and line.

    FILE is JSONL, CSV or TSV, tars (shard-{000..031}.tar), parquet, a folder of media, or the YAML config of a run:
    then every file that it trains on is checked; of align for what its streams need and its text towers take.
    """
    from mmllm.data.check import check_file, words_limit
    from mmllm.data.columns import column_options

    if file.endswith((".yaml", ".yml")):
        from mmllm.train.align_check import check_config

        records, problems = check_config(file, overrides, limit)
    else:
        wanted = [n.strip() for n in needs.split(",") if n.strip()]
        limit_of = words_limit(text_limit) if text_limit else None
        records, problems = check_file(file, limit, wanted, limit_of, column_options(columns) or None)
    for line in problems:
        click.echo(line)
    click.echo(f"{file}: {records} records, {len(problems)} problems")
    if problems:
        raise SystemExit(2)


@command.command("preview")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), default=Path("preview.html"), show_default=True)
@click.option("-n", "number", type=click.IntRange(1), default=24, show_default=True, help="Records to show.")
@click.option("--seed", default=0, show_default=True, help="Which records.")
def preview(file: Path, out: Path, number: int, seed: int) -> None:
    """Write one HTML page with some records: pictures with their boxes, sounds, texts."""
    from mmllm.data.preview import write_preview

    click.echo(write_preview(file, out, number, seed))


@command.command("bench")
@click.option("--dataset", default="starter:fast", show_default=True, help="Dataset folder, or starter:full.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for the benchmarks.")
@click.option("--tasks", help="Comma-separated: pope, chair, mme, ...; default, all that the dataset allows.")
@click.option("--split", default="seen", show_default=True, help="seen, or new_vendor: art that training never saw.")
@click.option("--limit", type=click.IntRange(1), help="Most scenes, sounds and pairs.")
@click.option("--seed", type=int, default=0, show_default=True, help="For all that is drawn.")
@click.option("--force", is_flag=True, help="Write again even if nothing changed.")
def bench(
    dataset: str, out: Path, tasks: str | None, split: str, limit: int | None, seed: int, force: bool
) -> None:  # fmt: skip
    """Write benchmarks with exact truth, in the official layouts, from a dataset's held-out scenes and sounds."""
    from mmllm.evaluate.made.make import items_of, make_benchmarks

    wanted = [t.strip() for t in (tasks or "").split(",") if t.strip()]
    folder = make_benchmarks(dataset, out, wanted, split, limit, seed, force)
    click.echo(", ".join(f"{name} {count}" for name, count in items_of(folder).items()))
    click.echo(f"mmllm eval --model RUN --data {folder} --tasks {','.join(items_of(folder))}")


@command.command("licences")
@click.argument("recipe", default="starter.yaml")
def licences(recipe: str) -> None:
    """List every source of a recipe with its licence and whom to credit."""
    from rich.console import Console
    from rich.table import Table

    from mmllm.data.sources import licences as rows
    from mmllm.data.sources import load_recipe

    table = Table("source", "package", "version", "via", "licence", "credit")
    for row in rows(load_recipe(recipe)):
        table.add_row(*(row[k] for k in ("name", "package", "version", "via", "licence", "credit")))
    Console().print(table)
