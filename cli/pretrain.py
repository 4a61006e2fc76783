"""`mmllm pretrain CONFIG`: the connectors learn to speak to a frozen LLM."""

from __future__ import annotations

from pathlib import Path

from mmllm.cli._common import training_command


def _pretrain(config: str, overrides: tuple[str, ...], out: Path | None, resume: bool) -> None:
    from mmllm.train.tune import run_stage

    run_stage("pretrain", config, overrides, out, resume)


def _plan(config: str, overrides: tuple[str, ...], nproc: int) -> None:
    from mmllm.train.dry_run import dry_run

    dry_run("pretrain", config, overrides, nproc)


command = training_command("pretrain", "Connect aligned towers to an LLM: train the connector.", _plan)(_pretrain)
