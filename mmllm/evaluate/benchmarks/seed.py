"""SEED-Bench (Li et al. 2023, arXiv 2307.16125), its questions on pictures: four choices, accuracy per kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmllm.evaluate.benchmarks import parsers
from mmllm.evaluate.benchmarks.base import Answered, Benchmark
from mmllm.evaluate.benchmarks.choices import letter_style, lettered
from mmllm.evaluate.benchmarks.files import field, read_json
from mmllm.evaluate.benchmarks.scores import accuracy_figures
from mmllm.evaluate.tasks import Sample
from mmllm.registry import register
from mmllm.report.figures import Figure


@register("benchmark", "seed")
class SeedBench(Benchmark):
    """Questions on videos are left out. The authors rank the options by probability; style ``scored`` is nearest."""

    name = "seed"
    folders = ("SEED-Bench", "seed_bench", "SEED")
    layout = "SEED-Bench.json {questions: [...]} and the pictures by data_id in SEED-Bench-image/"
    source = "huggingface.co/datasets/AILab-CVC/SEED-Bench"
    styles = {
        "official": letter_style(parsers.letter_first, note="pictures only, no videos"),
        "llava": letter_style(parsers.letter_alone, note="pictures only, no videos"),
        "lmms": letter_style(parsers.letter_first, note="pictures only, no videos"),
    }
    closed = True

    def read(self) -> list[Sample]:
        path = self.need("SEED-Bench.json", "*SEED*Bench*.json")
        data = read_json(path)
        kinds = {v: k for k, v in (data.get("question_type") or {}).items()}
        rows = [r for r in field(data, "questions", path) if r.get("data_type", "image") == "image"]
        return [self._sample(r, kinds, path) for r in rows]

    def _sample(self, row: dict[str, Any], kinds: dict[Any, str], path: object) -> Sample:
        name = str(field(row, "data_id", path))
        options = lettered([field(row, f"choice_{x}", path) for x in "abcd"])
        kind = row.get("question_type_id")
        media = self.any_of(*(f"{folder}{name}{end}" for folder in ("SEED-Bench-image/", "images/", "")
                              for end in ("", ".jpg", ".png")))  # fmt: skip
        return Sample(str(field(row, "question_id", path)), name, [media], str(field(row, "question", path)),
                      str(field(row, "answer", path)).strip().upper(), list(options),
                      meta={"options": options, "kind": kinds.get(kind, f"type {kind}")})  # fmt: skip

    def aggregate(self, rows: Sequence[Answered]) -> list[Figure]:
        return accuracy_figures("seed", rows, self.seed, "kind")
