"""Which task names of `mmllm eval` are benchmarks in official files, and the table of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mmllm.errors import UserError, unknown
from mmllm.evaluate.benchmarks import benchmark_names, get_benchmark

COLUMNS = ("benchmark", "styles (the first is the default)", "files", "from")


def are_benchmarks(wanted: Sequence[str], data: str, style: str | None) -> bool:
    """Whether the tasks are benchmarks in official files.

    A name of both kinds (pope) is a benchmark when a style is given, beside other benchmarks, or where the data folder
    is none that ``mmllm data build`` made.

    Raises:
        UserError: an unknown task, or tasks of both kinds together.
    """
    from mmllm.evaluate.run import task_names

    benchmarks, own = set(benchmark_names()), set(task_names())
    for name in wanted:
        if name not in benchmarks | own:
            raise unknown("task", name, benchmarks | own, "--tasks")
    only = [t for t in wanted if t not in own]
    mixed = [t for t in wanted if t not in benchmarks]
    if only and mixed:
        raise UserError(f"{only[0]} is a benchmark and {mixed[0]} is not", "--tasks", "ask them in two commands")
    official = Path(data).is_dir() and not (Path(data) / "dataset.json").is_file()
    return bool(wanted) and not mixed and (bool(only) or style is not None or official)


def benchmark_rows() -> list[tuple[str, ...]]:
    """One row of strings per benchmark; columns as in ``COLUMNS``."""
    classes = [get_benchmark(name) for name in benchmark_names()]
    return [(c.name, ", ".join(c.style_names()), c.layout, c.source) for c in classes]
