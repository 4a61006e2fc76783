"""GQA (Hudson and Manning 2019, arXiv 1902.09506): questions made from scene graphs, one right answer each."""

from __future__ import annotations

import re
from collections.abc import Sequence

from mmllm.evaluate.benchmarks import parsers
from mmllm.evaluate.benchmarks.base import SHORT, Answered, Benchmark, Style
from mmllm.evaluate.benchmarks.files import field, read_json
from mmllm.evaluate.benchmarks.scores import by, slug
from mmllm.evaluate.tasks import Sample, pooled_figures
from mmllm.registry import register
from mmllm.report.figures import Figure


def plain(text: str) -> str:
    """Lower case without any punctuation."""
    return re.sub(r"[^\w\s]", "", text.lower()).strip()


@register("benchmark", "gqa")
class Gqa(Benchmark):
    """The balanced test-dev part."""

    name = "gqa"
    folders = ("GQA",)
    layout = "testdev_balanced_questions.json {ID: {question, answer, imageId}} and images/IMAGEID.jpg"
    source = "cs.stanford.edu/people/dorarad/gqa/download.html"
    parses = False
    styles = {
        "official": Style(lambda s: s.question + SHORT, lambda text, s: parsers.bare_answer(text)),
        "llava": Style(lambda s: s.question + SHORT, lambda text, s: parsers.bare_answer(text)),
        "lmms": Style(lambda s: s.question + SHORT, lambda text, s: plain(text)),
    }

    def read(self) -> list[Sample]:
        path = self.need("testdev_balanced_questions.json", "*questions*.json")
        out = []
        for number, row in read_json(path).items():
            picture = str(field(row, "imageId", path))
            kind = (row.get("types") or {}).get("structural", "")
            media = self.any_of(f"images/{picture}.jpg", f"images/{picture}.png", f"{picture}.jpg")
            out.append(Sample(str(number), picture, [media], str(field(row, "question", path)),
                              str(field(row, "answer", path)), meta={"kind": kind}))  # fmt: skip
        return out

    def judge(self, row: Answered) -> None:
        gold = plain(row.sample.gold) if self.style_name == "lmms" else parsers.bare_answer(row.sample.gold)
        row.hit = float(row.parsed == gold)

    def aggregate(self, rows: Sequence[Answered]) -> list[Figure]:
        out = pooled_figures("gqa_accuracy", rows, seed=self.seed)
        for kind, some in by(rows, lambda r: r.sample.meta["kind"]).items():
            out += pooled_figures(f"gqa_accuracy_{slug(kind)}", some, seed=self.seed)[:1]
        return out
