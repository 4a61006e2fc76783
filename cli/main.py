"""The `mmllm` command: finds commands by name without importing them, and turns user errors into one line."""

from __future__ import annotations

import importlib
import sys

import click

from mmllm import __version__
from mmllm.collector import few_collections
from mmllm.errors import UserError, nearest
from mmllm.openmp import short_waits

# Help lines stand here so that `mmllm --help` imports no command.
COMMANDS = {
    "quickstart": "Run the whole road on the starter recipe and write a report.",
    "align": "Align vision and audio encoders with text (contrastive stage).",
    "pretrain": "Connect aligned towers to an LLM: train the connector.",
    "tune": "Tune connector and LLM (LoRA) on conversations and boxes.",
    "chat": "Talk with a trained model about pictures and sounds.",
    "eval": "Measure a model, with intervals and controls.",
    "embed": "Embed a folder or records file with an align run.",
    "search": "Find the items nearest to a text, a picture or a sound.",
    "compare": "Compare two evaluated runs item by item: more than noise?",
    "report": "One page about a training run, or comparing several.",
    "decode": "List, explain and trace decoding methods.",
    "serve": "Serve a model through vLLM (OpenAI API).",
    "export": "Write a trained run as a complete Hugging Face folder.",
    "methods": "List the library of published methods, or show one.",
    "reproduce": "Run an experiment of the project again and write its report.",
    "data": "Build, check and preview data.",
    "doctor": "What is installed, what runs here, what is missing.",
    "cache": "List, verify or remove cached downloads and features.",
}


class LazyGroup(click.Group):
    """Imports a command's module only when that command is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        return importlib.import_module(f"mmllm.cli.{cmd_name}").command

    def resolve_command(self, ctx: click.Context, args: list[str]):
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            near = nearest(args[0], COMMANDS)
            raise UserError(f"no command '{args[0]}'", do=f"did you mean '{near}'?" if near else "see mmllm --help")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mmllm")
def cli() -> None:
    """Build your own multimodal LLM: align, pretrain, tune, chat, eval, serve."""


def main(argv: list[str] | None = None) -> None:
    """Runs the command line; a user's mistake ends in one line and exit code 2, an interrupt in 130."""
    short_waits()
    few_collections()
    try:
        code = cli.main(args=argv, prog_name="mmllm", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except UserError as e:
        click.echo(f"error: {e}", err=True)
        sys.exit(2)
    except click.ClickException as e:
        click.echo(f"error: {' '.join(e.format_message().split())}", err=True)
        sys.exit(2)
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        sys.exit(130)
