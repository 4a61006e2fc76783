"""A real run of a few steps over the tiny world, with an objective switched on by its line of config."""

from __future__ import annotations

import json
from typing import Any

from mmllm.config import parse_config
from mmllm.train.align import AlignConfig, align


def short_run(
    settings: dict[str, Any], folder: Any, objectives: list[Any], trains: list[str],
    measures: dict[str, Any] | None = None, **source: Any,
) -> list[dict[str, Any]]:  # fmt: skip
    """Trains three steps on one source of the tiny world; returns the rows of ``metrics.jsonl``.

    Args:
        measures: in place of the tiny world's.
        source: keys that win over those of the source ``things`` (pictures and names).
    """
    phase = settings["phases"]["both"]
    phase["sources"] = {"things": {**phase["sources"]["things"], **source}}
    phase |= {"objectives": objectives, "trains": trains, "train": {"max_steps": 3, "logging_steps": 1}}
    settings["phases"], settings["measures"] = {"both": phase}, measures or {}
    used = {s.split("@")[0] for s in phase["sources"]["things"]["streams"]}
    settings["streams"] = {n: s for n, s in settings["streams"].items() if n.split("@")[0] in used}
    settings["words"] = None
    align(parse_config(settings, AlignConfig), folder)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
