"""`mmllm methods`: the library of published methods, what each does and whether its effect shows."""

from __future__ import annotations

from pathlib import Path

import click


@click.group("methods")
def command() -> None:
    """The library of published methods: list, show."""


@command.command("list")
@click.option("--markdown", type=click.Path(path_type=Path, dir_okay=False), help="Write docs/methods.md.")
def list_methods(markdown: Path | None) -> None:
    """All methods with their kind and the verdict on their effect."""
    from mmllm.reproduce.effects.catalogue import page, table

    if markdown is not None:
        markdown.write_text(page(), encoding="utf-8")
        click.echo(str(markdown))
        return
    from mmllm.report.figures import print_table

    print_table(("method", "kind", "title", "effect"), table())


@command.command("show")
@click.argument("slug")
def show(slug: str) -> None:
    """One method: the config line that switches it on, what is left out, its effect."""
    from mmllm.methods import card
    from mmllm.reproduce.effects.catalogue import description

    for heading, text in description(card(slug)):
        click.echo(f"{heading}: " + text.replace("\n", "\n  "))
