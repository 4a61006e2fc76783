"""Checks all data of a config before anything is trained: `mmllm data check CONFIG.yaml`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from mmllm.config import find_config, load_config
from mmllm.data.models import resolve_dataset
from mmllm.train.align import AlignConfig


def check_config(path: str | Path, overrides: Sequence[str] = (), limit: int | None = None) -> tuple[int, list[str]]:
    """Looks at every record that the sources and measures of an align config read, or those of pretrain and tune.

    Each is checked for what its streams need and for the texts that its text towers take; a file that several of them
    read is checked for all together.

    Returns:
        the number of records, and one line "file:line: what is wrong" for every problem.

    Raises:
        UserError: the config, a tower or a data file.
    """
    from mmllm.align.reading import FIELD
    from mmllm.align.record_keys import tightest_limit
    from mmllm.data.check import check_file
    from mmllm.data.open import DataSpec, as_spec
    from mmllm.train.align_model import load_stream_tower

    if "phases" not in (yaml.safe_load(find_config(path).read_text(encoding="utf-8")) or {}):
        from mmllm.train.chat_config_check import check_chat_config

        return check_chat_config(path, overrides, limit)
    config = load_config(path, list(overrides), AlignConfig)
    folder = Path(resolve_dataset(config.dataset))
    towers = {}
    found: dict[str, tuple[DataSpec, set[str], set[str]]] = {}
    for data, needed, streams in readers(config):
        for one in data if isinstance(data, list) else [data]:
            spec = as_spec(one)
            _, fields, texts = found.setdefault(spec.model_dump_json(), (spec, set(), set()))
            fields |= {FIELD[str(config.streams[name].modality)] for name in needed}
            for name in streams:
                stream = config.streams[name]
                texts |= {stream.tower_of or name} if stream.modality == "text" else set()
    records, problems = 0, []
    for spec, fields, texts in found.values():
        if config.data.long_text == "skip":
            towers |= {t: load_stream_tower(config, t) for t in texts if t not in towers}
        limit_of = tightest_limit([towers[t] for t in sorted(texts) if t in towers])
        count, lines = check_file(spec, limit, sorted(fields), limit_of, root=folder)
        records, problems = records + count, problems + lines
    return records, problems


def readers(config: AlignConfig) -> Iterator[tuple[Any, list[str], list[str]]]:
    """(data, streams that each record must have, streams that read it) of every source and measure.

    Of measures only files that are there count. What a recipe makes records out of need not have all streams itself.
    """
    for phase in config.phases.values():
        for source in phase.sources.values():
            needed = [] if source.recipes else [s for s in source.streams if s not in source.optional]
            yield source.data, needed, source.streams
    folder = Path(resolve_dataset(config.dataset))
    for measure in config.measures.values():
        files = [measure.data] if isinstance(measure.data, str) else measure.data
        # Regions are judged against words of the vocabulary; of pairs a record may lack any half.
        needed = {"regions": measure.streams[:1], "pairs": [], "geometry": []}.get(measure.kind, measure.streams)
        needed = [] if measure.recipes else needed
        yield [f for f in files if (folder / f).is_file()], needed, needed
