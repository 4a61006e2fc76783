"""ScienceQA (Lu et al. 2022, arXiv 2209.09513): school questions with and without a picture; accuracy of both kinds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmllm.evaluate.benchmarks import parsers
from mmllm.evaluate.benchmarks.base import LETTER, Answered, Benchmark, Style
from mmllm.evaluate.benchmarks.choices import by_letters, lettered, option_lines, options_of
from mmllm.evaluate.benchmarks.files import field, read_json
from mmllm.evaluate.benchmarks.scores import accuracy_figures
from mmllm.evaluate.tasks import Sample, pooled_figures
from mmllm.registry import register
from mmllm.report.figures import Figure


def letter_prompt(sample: Sample) -> str:
    """Context line where there is a hint, question, options as lines, request for a letter."""
    hint = sample.meta["hint"]
    context = f"Context: {hint}\n" if hint else ""
    return f"{context}{sample.question}\n{option_lines(options_of(sample))}{LETTER}"


def official_prompt(sample: Sample) -> str:
    """The authors' form (question, context, options in one line), without worked examples."""
    options = " ".join(f"({x}) {words}" for x, words in options_of(sample).items())
    context = sample.meta["hint"] or "N/A"
    return f"Question: {sample.question}\nContext: {context}\nOptions: {options}\nAnswer:"


@register("benchmark", "scienceqa")
class ScienceQa(Benchmark):
    """The test split. The first style is LLaVA's: models answer the official prompt in the official form only after
    seeing worked examples of it."""

    name = "scienceqa"
    folders = ("ScienceQA",)
    layout = "problems.json, pid_splits.json and the pictures in images/test/PID/image.png (or test/PID/image.png)"
    source = "github.com/lupantech/ScienceQA"
    styles = {
        "llava": Style(letter_prompt, by_letters(parsers.letter_llava), 32),
        "lmms": Style(letter_prompt, by_letters(parsers.letter_dot), 32),
        "official": Style(official_prompt, by_letters(parsers.letter_said), 64,
                          note="no worked examples; only 'The answer is X.' counts"),
    }  # fmt: skip
    closed = True

    def read(self) -> list[Sample]:
        path = self.need("problems.json", "data/scienceqa/problems.json")
        splits = read_json(self.need("pid_splits.json", "data/scienceqa/pid_splits.json"))
        problems = read_json(path)
        return [self._sample(str(pid), field(problems, str(pid), path), path) for pid in field(splits, "test", path)]

    def _sample(self, pid: str, row: dict[str, Any], path: object) -> Sample:
        options = lettered(field(row, "choices", path))
        image = row.get("image")
        places = [f"{folder}/{pid}/{image}" for folder in ("images/test", "test", "images")]
        right = list(options)[int(field(row, "answer", path))]
        meta = {"options": options, "hint": row.get("hint") or "", "subject": row.get("subject", "")}
        media = [self.any_of(*places)] if image else []
        return Sample(pid, pid, media, str(field(row, "question", path)), right, list(options), meta=meta)

    def aggregate(self, rows: Sequence[Answered]) -> list[Figure]:
        pictures = [r for r in rows if r.sample.media]
        out = accuracy_figures("scienceqa", rows, self.seed, "subject")
        if pictures:
            chance = sum(1 / len(r.sample.choices or [1]) for r in pictures) / len(pictures)
            out += pooled_figures("scienceqa_image_accuracy", pictures, chance, seed=self.seed)
        return out
