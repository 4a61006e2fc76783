"""What caption benchmarks share: references, one caption per picture or sound, CIDEr-D."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mmllm.evaluate.benchmarks.base import Answered, Benchmark, Style
from mmllm.evaluate.benchmarks.cider import cider_d, tokens
from mmllm.evaluate.tasks import Sample, pooled_figures
from mmllm.report.figures import Figure

PICTURE = "Provide a one-sentence caption for the provided image."
SOUND = "Describe the audio."
TOKENS_NOTE = "tokens cut in Python, close to the Java tokenizer of COCO"


def fixed(words: str, tokens: int = 64) -> Style:
    """The same words for every sample; the answer as it is."""
    said: Callable[[Sample], str] = lambda sample: words  # noqa: E731
    return Style(said, lambda text, sample: text.strip(), tokens)


class CaptionBenchmark(Benchmark):
    """``sample.gold`` is the list of references; document frequencies come from the references of what is asked."""

    parses = False

    def judge(self, row: Answered) -> None:
        row.counts = {"tokens": float(len(tokens(row.answer).split()))}

    def aggregate(self, rows: Sequence[Answered]) -> list[Figure]:
        """CIDEr-D of the captions (and of the control with the same document frequencies), and their length."""
        references = [[tokens(x) for x in r.sample.gold] for r in rows]
        corpus = [refs for refs, r in zip(references, rows, strict=True) if not r.sample.control]
        for row, score in zip(rows, cider_d([tokens(r.answer) for r in rows], references, corpus), strict=True):
            row.hit = score
        out = pooled_figures(f"{self.name}_cider_d", rows, seed=self.seed, note=TOKENS_NOTE)
        for figure in out:
            figure.unit = "CIDEr-D"
        real = [r for r in rows if not r.sample.control]
        length = sum(r.counts["tokens"] for r in real) / max(len(real), 1)
        return [*out, Figure(f"{self.name}_caption_tokens", length, n=len(real), unit="tokens")]
