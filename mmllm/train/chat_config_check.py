"""Checks all data of a pretrain or tune config before anything is trained: `mmllm data check CONFIG.yaml`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mmllm.config import load_config
from mmllm.data.check import check_record
from mmllm.data.models import resolve_dataset
from mmllm.data.rejected import Rejected
from mmllm.errors import UserError
from mmllm.train.tune import read_data
from mmllm.train.tune_config import TuneConfig


def check_chat_config(
    path: str | Path, overrides: Sequence[str] = (), limit: int | None = None
) -> tuple[int, list[str]]:
    """Looks at every record of a config's sources as a run would, and decodes each of their media once.

    What only the LLM can tell (its template, the length in its tokens) is left to the run.

    Returns:
        the number of records, and one line "file:line (id 'x'): what is wrong" for every problem.

    Raises:
        UserError: the config, or a missing data file.
    """
    config = load_config(path, list(overrides), TuneConfig)
    if limit is not None:
        config.limit = limit
    rejected, records, where = Rejected(max_share=1.0), [], []
    try:
        data = read_data(config, Path(resolve_dataset(config.dataset)), rejected)
        records, where = data.records, data.where
    except UserError:
        if not rejected.rows:  # nothing is wrong with a record, so it is with the config or a file
            raise
    lines = [f"{row['where']}: {row['why']}" for row in rejected.rows]
    media: dict[tuple[str, str], str | None] = {}
    for place, record in zip(where, records):
        lines += [f"{place}: {problem}" for problem in check_record(record, media)]
    return len(records) + len(rejected.rows), list(dict.fromkeys(lines))
