"""`mmllm chat`: talk with a trained model about pictures and sounds, once or in a terminal session."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("chat")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("-i", "--image", "images", multiple=True, type=click.Path(path_type=Path), help="A picture; repeatable.")
@click.option("-a", "--audio", "sounds", multiple=True, type=click.Path(path_type=Path), help="A sound; repeatable.")
@click.option("-q", "--question", help="Answer this one question and leave; without it a session begins.")
@click.option(
    "--decode",
    default="greedy",
    show_default=True,
    help="Any method as NAME:KEY=VALUE,... or @FILE; see mmllm decode list.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), help="Picture file for the boxes of an answer; default NAME.boxes.png."
)
@click.option("--max-new-tokens", type=click.IntRange(1), default=128, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True, help="Seeds sampling and noised views.")
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16"]), default="auto", show_default=True)
@click.option(
    "--history/--no-history", default=True, show_default=True, help="Send earlier questions and answers along."
)
def command(
    run: Path,
    images: tuple[Path, ...],
    sounds: tuple[Path, ...],
    question: str | None,
    decode: str,
    out: Path | None,
    max_new_tokens: int,
    seed: int,
    dtype: str,
    history: bool,
) -> None:
    """Talk with the model in RUN (a run of pretrain or tune, or a model folder).

    Pictures and sounds given with -i and -a stand before the question. In a session, /help lists the commands.
    """
    from mmllm.decode.parse import parse_spec
    from mmllm.errors import UserError
    from mmllm.starter.chat import Chat, answer, talk

    spec = parse_spec(decode)
    if question is not None and not question.strip():
        raise UserError("the question is empty", "-q", "write what you want to know")
    if out is not None and not out.absolute().parent.is_dir():
        raise UserError("no such folder", out.parent, "make it first")

    import torch

    from mmllm.decode import Decoder
    from mmllm.model import load_model

    decoder = Decoder(*load_model(run, None if dtype == "auto" else getattr(torch, dtype), "auto"))
    chat = Chat(decoder, spec, max_new_tokens, seed, out, history)
    for path in images:
        chat.show("image", path)
    for path in sounds:
        chat.show("audio", path)
    if question is None:
        talk(chat)
    else:
        answer(chat, question)
