"""`mmllm export`: a trained run as a complete Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("export")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="New folder to write.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Of the LLM; default as saved.")
@click.option(
    "--merge/--adapter",
    default=True,
    show_default=True,
    help="Only the merged weights, or the LoRA adapter beside them.",
)
def command(model: Path, out: Path, dtype: str | None, merge: bool) -> None:
    """Write MODEL (a run of pretrain or tune) as one folder with weights, config, tokenizer and processor.

    transformers loads it after `import mmllm.model`; mmllm chat, eval and serve take it in place of a run.
    """
    from mmllm.serve.export import export_model

    folder = export_model(model, out, dtype=dtype, adapter=not merge)
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    click.echo(f"{folder}: {size / 1e6:.0f} MB. Talk with it: mmllm chat {folder}   Serve it: mmllm serve {folder}")
