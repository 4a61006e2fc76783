"""An arm of a comparison: the ordinary training commands with some settings changed, run once per seed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from mmllm.reproduce.ledger import Ledger

RUN = "run"  # a training stage's run folder, inside its folder of the ledger


@dataclass(frozen=True)
class Step:
    """One training command as a user would type it: ``mmllm COMMAND CONFIG KEY=VALUE ...``."""

    command: Literal["align", "pretrain", "tune"]
    config: str
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Arm:
    """One side of a comparison.

    Attributes:
        steps: training commands in order; each but the first starts from the run before it (``init``).
    """

    name: str
    steps: tuple[Step, ...]


# Runs a step with its overrides in a run folder.
Command = Callable[[Step, Sequence[str], Path], None]


def run_command(step: Step, overrides: Sequence[str], out: Path) -> None:
    """Runs a training command in this process; an unfinished run in ``out`` is resumed."""
    resume = (out / "run.json").is_file()
    if step.command == "align":
        from mmllm.train.align import run_align

        run_align(step.config, tuple(overrides), out, resume)
    else:
        from mmllm.train.tune import run_stage

        run_stage(step.command, step.config, tuple(overrides), out, resume)


def train_arm(
    arm: Arm,
    seed: int,
    dataset: Path,
    ledger: Ledger,
    depends: Mapping[str, Any],
    command: Command = run_command,
) -> list[Path]:
    """The run folders of an arm's steps for one training seed; steps that are finished are not run again.

    Args:
        dataset: the folder that all steps read.
        depends: what the dataset is made from; part of every step's key.
        command: runs one step.
    """
    runs: list[Path] = []
    done: list[dict[str, Any]] = []
    for step in arm.steps:
        done.append({"command": step.command, "config": _settings(step.config), "overrides": list(step.overrides)})
        overrides = [f"dataset={dataset}", f"train.seed={seed}", *step.overrides]
        if runs:
            overrides.append(f"init={runs[-1]}")
        key = {"seed": seed, "data": depends, "steps": list(done)}
        folder = ledger.stage(f"{arm.name}-seed{seed}-{step.command}", key, partial(_into, command, step, overrides))
        runs.append(folder / RUN)
    return runs


def _into(command: Command, step: Step, overrides: Sequence[str], folder: Path) -> None:
    command(step, overrides, folder / RUN)


def _settings(config: str) -> str:
    """The config file's text: another text is another experiment."""
    from mmllm.config import find_config

    return find_config(config).read_text(encoding="utf-8")
