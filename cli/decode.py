"""`mmllm decode`: lists the decoding methods, explains one, and shows what it does token by token."""

from __future__ import annotations

from pathlib import Path

import click


@click.group("decode")
def command() -> None:
    """Decoding methods: list, explain, trace, directions."""


@command.command("list")
def list_methods() -> None:
    """All methods with rows per token and gain."""
    from mmllm.decode.explain import LEFT_OUT, method_table
    from mmllm.report.figures import print_table

    print_table(("method", "rows", "gain", "what it does"), method_table())
    click.echo(f"Join methods with +, such as vcd+ritual:normalize=true. {LEFT_OUT}")


@command.command("explain")
@click.argument("spec")
@click.option("--yaml", "as_yaml", is_flag=True, help="The program behind it, as YAML for --decode @FILE.")
def explain(spec: str, as_yaml: bool) -> None:
    """What METHOD:KEY=VALUE,... computes, costs and is bad at."""
    from mmllm.decode.explain import explanation
    from mmllm.decode.parse import parse_spec

    read = parse_spec(spec)
    if as_yaml:
        click.echo(read.to_yaml(expand=True), nl=False)
        return
    for heading, text in explanation(read):
        click.echo(f"{heading}: " + text.replace("\n", "\n  "))


@command.command("trace")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("-i", "--image", "images", multiple=True, type=click.Path(path_type=Path), help="A picture; repeatable.")
@click.option("-a", "--audio", "sounds", multiple=True, type=click.Path(path_type=Path), help="A sound; repeatable.")
@click.option("-q", "--question", required=True)
@click.option("--decode", default="vcd", show_default=True, help="Any method; see mmllm decode list.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=16, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), help="Write FILE.html (a picture) or FILE.json."
)
def trace(
    run: Path,
    images: tuple[Path, ...],
    sounds: tuple[Path, ...],
    question: str,
    decode: str,
    max_new_tokens: int,
    seed: int,
    out: Path | None,
) -> None:
    """Per token: the five best of each view and of the mix, and how many tokens stayed plausible."""
    from mmllm.decode.parse import parse_spec
    from mmllm.errors import UserError

    spec = parse_spec(decode)
    if out is not None and out.suffix not in (".html", ".json"):
        raise UserError(f"cannot write '{out.suffix}'", out, "name it FILE.html or FILE.json")
    from mmllm.starter.trace import print_trace, trace_run, write_trace

    steps = trace_run(run, images, sounds, question, spec, max_new_tokens, seed)
    print_trace(steps)
    if out is not None:
        write_trace(out, steps, spec, question)
        click.echo(f"written: {out}")


@command.command("directions")
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("demos", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), default=Path("directions.safetensors"),
              show_default=True)  # fmt: skip
def directions(run: Path, demos: Path, out: Path) -> None:
    """Make steering directions for vti from DEMOS: lines with image, question, right and hallucinated answer."""
    from mmllm.decode.directions import read_demos, text_directions, write_directions

    pairs = read_demos(demos)
    from mmllm.decode import Decoder
    from mmllm.model import load_model

    write_directions(out, text_directions(Decoder(*load_model(run, device="auto")), pairs))
    click.echo(f"{len(pairs)} demos; use --decode vti:vectors={out}")
