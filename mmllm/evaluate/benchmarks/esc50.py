"""ESC-50 (Piczak 2015): which of fifty sounds is it; the model is told the fifty names."""

from __future__ import annotations

from collections.abc import Sequence

from mmllm.evaluate.benchmarks import parsers
from mmllm.evaluate.benchmarks.base import Answered, Benchmark, Style
from mmllm.evaluate.benchmarks.files import read_table
from mmllm.evaluate.benchmarks.scores import accuracy_figures
from mmllm.evaluate.tasks import Sample
from mmllm.registry import register
from mmllm.report.figures import Figure


def which(sample: Sample) -> str:
    """The question with all names."""
    return f"What is the sound? Choose one of: {', '.join(sample.choices or ())}."


@register("benchmark", "esc50")
class Esc50(Benchmark):
    """Accuracy over all clips, and by fold. Clips cut from one recording are one cluster.

    The data set has no official prompt; ``scored`` takes the most probable of the fifty names.
    """

    name = "esc50"
    folders = ("ESC-50", "ESC-50-master")
    layout = "meta/esc50.csv {filename, fold, target, category, src_file} and the clips in audio/"
    source = "github.com/karolpiczak/ESC-50"
    kind = "audio"
    styles = {"official": Style(which, lambda text, s: parsers.name_in(text, s.choices or ()), 16)}
    closed = True
    templates = ("This is a sound of {}.",)  # the data set leaves open how its classes are put into words

    def read(self) -> list[Sample]:
        path = self.need("meta/esc50.csv", "esc50.csv")
        rows = read_table(path, "filename", "fold", "category")
        names = sorted({_plain(r["category"]) for r in rows})
        return [Sample(r["filename"], r.get("src_file") or r["filename"],
                       [self.any_of(f"audio/{r['filename']}", r["filename"])], "", _plain(r["category"]), names,
                       "audio",
                       meta={"fold": f"fold{r['fold']}"})
                for r in rows]  # fmt: skip

    def aggregate(self, rows: Sequence[Answered]) -> list[Figure]:
        return accuracy_figures("esc50", rows, self.seed, "fold")


def _plain(category: str) -> str:
    return category.replace("_", " ")
