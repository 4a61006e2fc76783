"""`mmllm search "a red bird" --index DIR`: the nearest items of what `mmllm embed` has embedded."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command("search")
@click.argument("text", required=False)
@click.option("--index", type=click.Path(path_type=Path), required=True, help="Folder that mmllm embed wrote.")
@click.option("--image", type=click.Path(path_type=Path), help="A picture as the query.")
@click.option("--audio", type=click.Path(path_type=Path), help="A sound as the query.")
@click.option("-k", type=click.IntRange(1), default=5, show_default=True, help="Items to show.")
@click.option("--in", "streams", multiple=True, help="Stream to search; default: those aligned with such queries.")
@click.option("--model", type=click.Path(path_type=Path), help="Align run; default: the one of the index.")
@click.option("--json", "as_json", is_flag=True, help="Print the items as JSON lines.")
def command(
    text: str | None,
    index: Path,
    image: Path | None,
    audio: Path | None,
    k: int,
    streams: tuple[str, ...],
    model: Path | None,
    as_json: bool,
) -> None:
    """Show the items nearest to TEXT, a picture or a sound."""
    from mmllm.errors import UserError
    from mmllm.evaluate.embed import Embedder, search_data
    from mmllm.evaluate.index import Index

    given = {f: v for f, v in (("text", text), ("image", image), ("audio", audio)) if v is not None}
    if len(given) != 1:
        raise UserError(
            "give one query", do='a text, --image FILE or --audio FILE: mmllm search "a red bird" --index DIR'
        )
    field, query = next(iter(given.items()))
    held = Index.load(index)
    for hit in search_data(Embedder(model or held.model), held, field, query, k, streams):
        if as_json:
            click.echo(json.dumps({"stream": hit.stream, "score": round(hit.score, 6), **hit.item}, ensure_ascii=False))
        else:
            shown = hit.item.get("path") or hit.item.get("text", "")
            click.echo(f"{hit.score:.3f}\t{hit.stream}\t{hit.item['id']}\t{shown}")
