"""`mmllm align CONFIG`: the contrastive stage."""

from __future__ import annotations

from pathlib import Path

from mmllm.cli._common import training_command


def _align(config: str, overrides: tuple[str, ...], out: Path | None, resume: bool) -> None:
    from mmllm.train.align import run_align

    run_align(config, overrides, out, resume)


command = training_command("align", "Align vision and audio encoders with text (contrastive stage).")(_align)
