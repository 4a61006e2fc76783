"""`mmllm serve`: a trained model behind the OpenAI API, by real vLLM with our plugin."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("serve", context_settings={"ignore_unknown_options": True})
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("extra", nargs=-1, type=click.UNPROCESSED, metavar="[VLLM FLAGS]...")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@click.option("--host", default="127.0.0.1", show_default=True, help="0.0.0.0 lets other machines in.")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "bfloat16", "float16", "float32"]),
    default="auto",
    show_default=True,
    help="auto is the saved one, or float32 on a CPU without bfloat16.",
)
@click.option("--name", help="Model name that clients give; default the folder's name.")
@click.option("--python", help="The Python that has vLLM and mmllm; default $MMLLM_VLLM_PYTHON, else this one.")
@click.option("--log", type=click.Path(path_type=Path), help="File for vLLM's output; default in the temporary folder.")
@click.option(
    "--check", is_flag=True, help="Compare served answers with our own greedy decoding, token by token, and end."
)
@click.option("--out", type=click.Path(path_type=Path), help="Where --check writes its figures (JSON).")
def command(
    model: Path,
    extra: tuple[str, ...],
    port: int,
    host: str,
    dtype: str,
    name: str | None,
    python: str | None,
    log: Path | None,
    check: bool,
    out: Path | None,
) -> None:
    """Serve MODEL (a run of pretrain or tune, or an exported folder) through vLLM.

    Text, pictures and sounds by any OpenAI client. Flags that mmllm does not know go to vLLM as they are, such as
    --max-model-len 8192.
    """
    from mmllm.serve.run import serve

    code = serve(
        model,
        check=check,
        out=out,
        port=0 if check else port,
        host=host,
        dtype=dtype,
        name=name,
        python=python,
        extra=extra,
        log=log,
    )
    raise SystemExit(code)
