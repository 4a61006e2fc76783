"""MMVP (Tong et al. 2024, arXiv 2401.06209): pairs of pictures that CLIP cannot tell apart; both must be right."""

from __future__ import annotations

import re
from collections.abc import Sequence

from mmllm.errors import UserError
from mmllm.evaluate.benchmarks import parsers
from mmllm.evaluate.benchmarks.base import LETTER, Answered, Benchmark, Style
from mmllm.evaluate.benchmarks.choices import by_letters, by_options, letter_style, lettered
from mmllm.evaluate.benchmarks.files import read_table
from mmllm.evaluate.benchmarks.scores import accuracy_figures, grouped
from mmllm.evaluate.tasks import Sample, pooled_figures
from mmllm.registry import register
from mmllm.report.figures import Figure

# Answers that the authors swapped (github.com/tsb0601/MMVP issue 30), as lmms-eval mends them.
MENDED = {"99": "B", "100": "A", "279": "B", "280": "A"}


def by_marks(text: str, sample: Sample) -> str | None:
    """The options stand under (a) and (b), so that is how they may be named."""
    return by_options(re.sub(r"\([a-z]\)", lambda m: m[0].upper(), text), sample)


@register("benchmark", "mmvp")
class Mmvp(Benchmark):
    """Neighbouring rows are a pair. The authors let GPT-4 read the answers; here rules do."""

    name = "mmvp"
    folders = ("MMVP", "MMVP_Benchmark")
    layout = "Questions.csv {Index,Question,Options,Correct Answer} and the pictures INDEX.jpg in 'MMVP Images'/"
    source = "huggingface.co/datasets/MMVP/MMVP"
    styles = {
        "official": Style(lambda s: f"{s.question} {s.meta['given']}", by_marks, 32,
                          note="answers as published, two pairs of them swapped; read by rules instead of GPT-4"),
        "llava": Style(lambda s: f"{s.question} {s.meta['given']}{LETTER}", by_letters(parsers.letter_pattern),
                       note="answers as published, two pairs of them swapped"),
        "lmms": letter_style(parsers.letter_pattern, note="two pairs of swapped answers mended"),
    }  # fmt: skip
    closed = True

    def read(self) -> list[Sample]:
        path = self.need("Questions.csv", "*uestions.csv")
        out = []
        for place, row in enumerate(read_table(path, "Index", "Question", "Options", "Correct Answer")):
            index = row["Index"].strip()
            options = lettered([x.strip() for x in re.split(r"\([a-z]\)", row["Options"]) if x.strip()])
            right = row["Correct Answer"].strip().strip("()").upper()
            if self.style_name == "lmms":
                right = MENDED.get(index, right)
            if right not in options:
                raise UserError(f"the answer of row {index} is none of its options", path)
            media = self.any_of(*(f"{folder}{index}{end}" for folder in ("MMVP Images/", "images/", "")
                                  for end in (".jpg", ".png")))  # fmt: skip
            meta = {"options": options, "given": row["Options"].strip(), "pair": place // 2}
            question = row["Question"].strip()
            out.append(Sample(index, str(place // 2), [media], question, right, list(options), meta=meta))
        return out

    def aggregate(self, rows: Sequence[Answered]) -> list[Figure]:
        pairs = grouped(rows, lambda r: r.sample.meta["pair"])
        out = pooled_figures("mmvp_pair_accuracy", pairs, 0.25, seed=self.seed, note="both pictures of a pair right")
        return out + accuracy_figures("mmvp", rows, self.seed)
