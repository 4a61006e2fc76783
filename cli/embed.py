"""`mmllm embed`: embeddings of a folder or records file by an align run, with an index of what they belong to."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("embed")
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("data")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Index folder.")
@click.option("--format", "kind", default="safetensors", show_default=True, help="safetensors or parquet.")
@click.option("--streams", help="Comma-separated; default: all that the data feed.")
@click.option("--column", "columns", multiple=True, metavar="FIELD=COLUMN", help="Which column is which field.")
@click.option("--batch-size", type=click.IntRange(1), default=64, show_default=True)
@click.option("--limit", type=click.IntRange(1), help="The first N records only.")
def command(
    run: Path,
    data: str,
    out: Path,
    kind: str,
    streams: str | None,
    columns: tuple[str, ...],
    batch_size: int,
    limit: int | None,
) -> None:
    """Embed DATA (a folder of media, or a records file of any kind) with the align run RUN."""
    from mmllm.data.columns import column_options
    from mmllm.data.rejected import Rejected
    from mmllm.evaluate.embed import Embedder, embed_data

    rejected = Rejected()
    wanted = [s.strip() for s in streams.split(",") if s.strip()] if streams else None
    index = embed_data(Embedder(run), data, wanted, column_options(columns) or None, batch_size, limit, rejected)
    index.save(out, kind, data=data)
    for row in rejected.rows:
        click.echo(f"left out: {row['where']}: {row['why']}", err=True)
    counts = ", ".join(f"{len(v):,} {k}" for k, v in index.vectors.items())
    click.echo(f"{out}: {counts}" + (f"; {rejected.count():,} left out" if rejected.rows else ""))
