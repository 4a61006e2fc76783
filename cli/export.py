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
@click.option(
    "--format",
    "layout",
    type=click.Choice(["mmllm", "llava"]),
    default="mmllm",
    show_default=True,
    help="llava: LlavaForConditionalGeneration, for a vision transformer with an MLP.",
)
def command(model: Path, out: Path, dtype: str | None, merge: bool, layout: str) -> None:
    """Write MODEL (a run of pretrain or tune) as one folder with weights, config, tokenizer and processor.

    transformers loads it after `import mmllm.model`; mmllm chat, eval and serve take it in place of a run. With
    --format llava it needs no mmllm, and `mmllm tune init=FOLDER` takes it back.
    """
    if layout == "llava":
        from mmllm.errors import UserError
        from mmllm.serve.export_llava import export_llava

        if not merge:
            raise UserError("a LLaVA folder has no place for an adapter", "--adapter", "leave --adapter out")
        click.echo(f"{export_llava(model, out, dtype=dtype)}: AutoModelForImageTextToText of transformers loads it")
        return
    from mmllm.serve.export import export_model

    folder = export_model(model, out, dtype=dtype, adapter=not merge)
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    click.echo(f"{folder}: {size / 1e6:.0f} MB. Talk with it: mmllm chat {folder}   Serve it: mmllm serve {folder}")
