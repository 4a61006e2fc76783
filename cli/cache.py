"""`mmllm cache ls|verify|rm`: look at, check and empty the download cache."""

from __future__ import annotations

import click


@click.group("cache")
def command() -> None:
    """List, verify or remove cached downloads, models, datasets and features."""


@command.command("ls")
@click.option("--json", "as_json", is_flag=True, help="Print the list as JSON.")
def ls(as_json: bool) -> None:
    """Everything in the cache, with its size and state."""
    import json

    from mmllm.data.cache import cache_root, entries, human

    found = entries()
    if as_json:
        click.echo(json.dumps([{**vars(e), "path": str(e.path)} for e in found], indent=2))
        return
    for e in found:
        click.echo(f"{human(e.bytes):>8}  {e.state:<10}  {e.label}")
    click.echo(f"{human(sum(e.bytes for e in found)):>8}  in {cache_root()}")


@command.command("verify")
@click.argument("names", nargs=-1)
def verify(names: tuple[str, ...]) -> int:
    """Compare every file with what was written; exit code 1 if something is damaged."""
    from mmllm.data.cache import entries, select
    from mmllm.data.cache import verify as check

    bad = 0
    for e in select(names) if names else entries():
        problem = check(e)
        note = "" if problem else " (no checksum kept)" if e.state == "built" else ""
        click.echo(f"{'BAD' if problem else 'ok ':<4} {e.label}{': ' + problem if problem else note}")
        bad += problem is not None
    if bad:
        click.echo(f"{bad} damaged: mmllm cache rm NAME removes one; it is fetched or made again when needed", err=True)
    return int(bad > 0)


@command.command("rm")
@click.argument("names", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="Remove everything.")
@click.option("--unfinished", is_flag=True, help="Remove what a killed process left half-written.")
def rm(names: tuple[str, ...], everything: bool, unfinished: bool) -> None:
    """Remove entries: by name (without version), by KIND, or by KIND/NAME."""
    from mmllm.data.cache import entries, human, remove, select
    from mmllm.errors import UserError

    if not (names or everything or unfinished):
        raise UserError(
            "nothing named to remove", do="give names as `mmllm cache ls` shows them, --unfinished or --all"
        )
    chosen = entries() if everything else select(names)
    if unfinished:
        chosen += [e for e in entries() if e.state == "unfinished" and e not in chosen]
    for e in chosen:
        remove(e)
        click.echo(f"removed {e.label} ({human(e.bytes)})")
    if not chosen:
        click.echo("nothing to remove")
