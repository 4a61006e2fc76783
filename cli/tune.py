"""`mmllm tune CONFIG`: connectors and LLM (LoRA) learn from conversations."""

from __future__ import annotations

from pathlib import Path

from mmllm.cli._common import training_command


def _tune(config: str, overrides: tuple[str, ...], out: Path | None, resume: bool) -> None:
    from mmllm.train.tune import run_stage

    run_stage("tune", config, overrides, out, resume)


command = training_command("tune", "Tune connector and LLM (LoRA) on conversations and boxes.")(_tune)
