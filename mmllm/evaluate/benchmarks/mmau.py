"""MMAU (Sakshi et al. 2024, arXiv 2410.19168): multiple choice about sounds, speech and music."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from mmllm.errors import UserError
from mmllm.evaluate.benchmarks import parsers
from mmllm.evaluate.benchmarks.base import Answered, Benchmark, Style
from mmllm.evaluate.benchmarks.choices import by_letters, letter_prompt, lettered
from mmllm.evaluate.benchmarks.files import field, read_json
from mmllm.evaluate.benchmarks.scores import accuracy_figures
from mmllm.evaluate.tasks import Sample
from mmllm.registry import register
from mmllm.report.figures import Figure


def by_words(text: str, sample: Sample) -> str | None:
    """The letter of the option whose words the answer has, by the authors' rule."""
    options = sample.meta["options"]
    found = parsers.words_of_option(text, list(options.values()))
    return next((x for x, words in options.items() if words == found), None)


def plain_prompt(sample: Sample) -> str:
    """The question and its options in one line."""
    options = " ".join(f"({x}) {words}" for x, words in sample.meta["options"].items())
    return f"{sample.question} Choose the correct option from the following options: {options}"


@register("benchmark", "mmau")
class Mmau(Benchmark):
    """The mini test, whose answers are public. The version of May 2025 changed about a quarter of its items."""

    name = "mmau"
    folders = ("MMAU",)
    layout = "mmau-test-mini.json {id, audio_id, question, choices, answer, task} and the sounds under audio_id"
    source = "github.com/Sakshi113/MMAU"
    kind = "audio"
    styles = {
        "official": Style(plain_prompt, by_words, 32, note="all words of an option and none of the others' alone"),
        "lmms": Style(letter_prompt, by_letters(parsers.letter_marked), 128, note="no random guess without a letter"),
    }
    closed = True

    def read(self) -> list[Sample]:
        path = self.need("mmau-test-mini.json", "*mmau*mini*.json", "*mmau*.json")
        return [self._sample(r, path) for r in read_json(path)]

    def _sample(self, row: dict[str, Any], path: object) -> Sample:
        choices = field(row, "choices", path)
        options = lettered(json.loads(choices) if isinstance(choices, str) else choices)
        answer = str(field(row, "answer", path)).strip()
        gold = next((x for x, words in options.items() if words.strip().lower() == answer.lower()), None)
        number = str(row.get("id") or field(row, "audio_id", path))
        if gold is None:
            raise UserError(f"the answer of {number} is none of its choices", path)
        audio = str(field(row, "audio_id", path)).removeprefix("./")
        name = audio.rsplit("/", 1)[-1]
        media = self.any_of(*(f"{place}{end}" for place in (audio, f"test-mini-audios/{name}", f"audio/{name}")
                              for end in ("", ".wav")))  # fmt: skip
        meta = {"options": options, "task": row.get("task", ""), "difficulty": row.get("difficulty", "")}
        question = str(field(row, "question", path))
        return Sample(number, audio, [media], question, gold, list(options), "audio", meta=meta)

    def aggregate(self, rows: Sequence[Answered]) -> list[Figure]:
        return accuracy_figures("mmau", rows, self.seed, "task")
