"""`mmllm eval --suite starter`: six benchmarks made here, asked in one command."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmllm.errors import UserError
from mmllm.report.figures import Figure

# Benchmark -> style; CHAIR with short captions, boxes as our own models write them, else each one's first.
TASKS: dict[str, str | None] = {
    "pope": None, "chair": "short", "mme": None, "mmvp": None, "seed": None, "refcoco": "mmllm",
}  # fmt: skip
CLUSTERS, CONTROL_CLUSTERS = 40, 20  # sized for minutes on two cores; --limit asks more
DATASETS = ("starter:full", "starter:medium", "starter:fast")


def suite_data(dataset: str | None) -> Path:
    """The suite's files, made on first use in the cache.

    Args:
        dataset: what they are made from, or a folder of ``mmllm data bench``; None takes the starter dataset that is
            built, the full one first.

    Raises:
        UserError: no such dataset.
    """
    from mmllm.data.models import resolve_dataset
    from mmllm.evaluate.made.make import ABOUT, cached_benchmarks

    if dataset is not None:
        made = Path(dataset) / ABOUT
        return made.parent if made.is_file() else cached_benchmarks(dataset)
    for name in DATASETS:
        try:
            resolve_dataset(name)
        except UserError:
            continue
        return cached_benchmarks(name)
    raise UserError("no starter dataset is built", do="run: mmllm data build data_recipes/starter.yaml --size fast")


def run_suite(
    model_path: str | Path,
    dataset: str | None = None,
    decode: str = "greedy",
    limit: int | None = None,
    out: str | Path | None = None,
    control: str | Sequence[str] = "shuffled",
    seed: int = 0,
    margins: bool = True,
    decoder: Any = None,
    command: str = "mmllm eval",
) -> list[Figure]:
    """Asks the six benchmarks; results as those of ``run_benchmarks``.

    Args:
        limit: most pictures per split and task; default ``CLUSTERS``.
        out: default ``bench/suite_DECODE`` in the model's folder.

    Raises:
        UserError: as ``run_benchmarks``, and no dataset to make the files from.
    """
    from mmllm.evaluate.benchmarks.runner import run_benchmarks

    slug = re.sub(r"\W+", "_", f"suite_{decode}").strip("_")
    folder = Path(out) if out is not None else Path(model_path) / "bench" / slug
    return run_benchmarks(
        model_path, suite_data(dataset), list(TASKS), TASKS, decode, limit or CLUSTERS, folder, control, seed, margins,
        CONTROL_CLUSTERS, decoder, command,
    )  # fmt: skip
