"""Questions with several media or with sound: which of four things do you hear, and what is in picture k of three."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from mmllm.data.questions import with_article
from mmllm.errors import UserError
from mmllm.evaluate.tasks import EvalData, EvalTask, Row, Sample, pooled_figures, shuffled
from mmllm.registry import register
from mmllm.report.figures import Figure


def _value(record: dict[str, Any], file: str, *names: str) -> Any:
    """The first of several keys that a record has.

    Raises:
        UserError: it has none of them.
    """
    for name in names:
        if record.get(name) is not None:
            return record[name]
    raise UserError(f"record {record.get('id')!r} has no '{names[0]}'", file, "build the dataset again")


@register("task", "hear")
class HearTask(EvalTask):
    """Which of four named things do you hear? Answered by the most probable of the four."""

    limit = 300
    file = "eval/hear.jsonl"

    @classmethod
    def splits(cls, data: EvalData) -> list[str]:
        return ["seen"] if data.has(cls.file) else []

    def samples(self) -> list[Sample]:
        out = []
        for record in self.data.records(self.file)[: self.limit]:
            options, answer = _value(record, self.file, "options"), _value(record, self.file, "answer")
            # Options may be bare names; the model answers with an article, as in training.
            choices = [o if o == answer or o.split()[0] in ("a", "an", "some") else with_article(o) for o in options]
            gold = answer if answer in choices else with_article(answer)
            out.append(Sample(str(record["id"]), str(record["id"]), [str(_value(record, self.file, "audio"))],
                              _value(record, self.file, "question"), gold, choices, "audio",
                              meta=dict(record.get("meta") or {})))  # fmt: skip
        return out

    def aggregate(self, rows: Sequence[Row]) -> list[Figure]:
        chance = sum(1 / len(r.sample.choices or [""]) for r in rows) / max(len(rows), 1)
        return pooled_figures("hear_accuracy", rows, chance, seed=self.data.seed)


@register("task", "interleaved")
class InterleavedTask(EvalTask):
    """Yes/no questions about picture k of three; the control shows the same pictures in another order."""

    limit = 100
    file = "eval/interleaved_seen.jsonl"

    @classmethod
    def splits(cls, data: EvalData) -> list[str]:
        return ["seen"] if data.has(cls.file) else []

    def samples(self) -> list[Sample]:
        out = []
        for record in self.data.records(self.file)[: self.limit]:
            parts = _value(record, self.file, "messages")[-1]["content"]
            media = [os.path.normpath(p["path"]) for p in parts if p["type"] == "image"]
            facts = (record.get("meta") or {}).get("questions", [])
            for k, (ask, answer) in enumerate(_value(record, self.file, "branches")):
                out.append(Sample(f"{record['id']}:{k}", str(record["id"]), media, ask["content"][-1]["text"],
                                  answer["content"][-1]["text"], ["yes", "no"],
                                  meta=dict(facts[k]) if k < len(facts) else {}))  # fmt: skip
        return out

    def control(self, samples: Sequence[Sample], seed: int) -> list[Sample]:
        """Pictures moved on by one place, so that none stays where it was."""
        return [shuffled(s, [*s.media[1:], s.media[0]]) for s in samples]

    def aggregate(self, rows: Sequence[Row]) -> list[Figure]:
        return pooled_figures("interleaved_accuracy", rows, 0.5, seed=self.data.seed,
                              note="control: the same pictures in another order")  # fmt: skip
