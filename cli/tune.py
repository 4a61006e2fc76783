"""`mmllm tune CONFIG`: connectors and LLM (LoRA) learn from conversations."""

from __future__ import annotations

from pathlib import Path

from mmllm.cli._common import training_command


def _tune(config: str, overrides: tuple[str, ...], out: Path | None, resume: bool) -> None:
    from mmllm.train.tune import run_stage

    run_stage("tune", config, overrides, out, resume)


def _plan(config: str, overrides: tuple[str, ...], nproc: int) -> None:
    from mmllm.train.dry_run import dry_run

    dry_run("tune", config, overrides, nproc)


command = training_command("tune", "Tune connector and LLM (LoRA) on conversations and boxes.", _plan)(_tune)
