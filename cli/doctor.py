"""`mmllm doctor`: what is installed, what runs here, what is missing and how to get it."""

from __future__ import annotations

import click


@click.command("doctor")
@click.option("--json", "as_json_", is_flag=True, help="Print the report as JSON.")
def command(as_json_: bool) -> int:
    """What is installed, what runs here, what is missing and how to get it.

    Exit code 1 when something that mmllm cannot do without is missing.
    """
    import json

    from rich.console import Console
    from rich.table import Table

    from mmllm.starter.doctor import abilities, as_json, examine

    checks = examine()
    failed = any(c.required and c.state in ("missing", "broken") for c in checks)
    if as_json_:
        click.echo(json.dumps(as_json(checks), indent=2))
        return int(failed)
    colours = {"ok": "green", "limited": "yellow", "missing": "red", "broken": "red"}
    console = Console()
    console.print("[bold]What is here[/]")
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for c in checks:
        table.add_row(f"[{colours[c.state]}]{c.state}[/]", c.name, c.found)
    console.print(table)
    todo = [c for c in checks if c.state != "ok" and (c.means or c.get)]
    if todo:
        console.print("\n[bold]What to know and how to get it[/]")
        for c in todo:
            console.print(
                f"{c.name}: {c.means}" + (f" → {c.get}" if c.get else ""), markup=False, highlight=False, soft_wrap=True
            )
    console.print("\n[bold]What runs[/]")
    runs = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, answer in abilities(checks).items():
        colour = "red" if answer.startswith("no") else "green" if answer == "yes" else "yellow"
        runs.add_row(name, f"[{colour}]{answer}[/]")
    console.print(runs)
    console.print("\nThe network was not tried.", highlight=False)
    return int(failed)
