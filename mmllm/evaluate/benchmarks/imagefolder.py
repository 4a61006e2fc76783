"""Pictures in a folder for each class, as CLIP_benchmark and torchvision's ImageFolder lay them out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mmllm.errors import UserError
from mmllm.evaluate.benchmarks import parsers
from mmllm.evaluate.benchmarks.base import Answered, Benchmark, Style
from mmllm.evaluate.benchmarks.scores import accuracy_figures
from mmllm.evaluate.tasks import Sample
from mmllm.registry import register
from mmllm.report.figures import Figure

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm"}
NAMES, TEMPLATES = "classnames.txt", "zeroshot_classification_templates.txt"


def which(sample: Sample) -> str:
    """The question with all names."""
    return f"What is in the picture? Choose one of: {', '.join(sample.choices or ())}."


@register("benchmark", "imagefolder")
class ImageFolder(Benchmark):
    """Zero-shot classes of an align run by CLIP_benchmark's protocol; a model that answers is told all names.

    The folders in their sorted order are the classes of ``classnames.txt``, line by line; without that file a folder's
    name is its class. A template has ``{c}`` or ``{}`` where the class goes.
    """

    name = "imagefolder"
    folders = ("imagefolder", "ImageFolder")
    layout = f"test/CLASS/PICTURE (or val/); {NAMES} and {TEMPLATES} (a line each), both optional"
    source = "github.com/LAION-AI/CLIP_benchmark, or any data set in the layout of torchvision's ImageFolder"
    styles = {"official": Style(which, lambda text, s: parsers.name_in(text, s.choices or ()), 16)}
    closed = True
    templates = ("a photo of a {}.",)

    def read(self) -> list[Sample]:
        folder = next((f for f in (self.root / "test", self.root / "val") if f.is_dir()), self.root)
        classes = sorted(f for f in folder.iterdir() if f.is_dir()) if folder.is_dir() else []
        if len(classes) < 2:
            raise UserError("no folders of classes here", folder, f"expected: {self.layout}; get it from {self.source}")
        names = self.lines(NAMES) or [f.name.replace("_", " ") for f in classes]
        if len(names) != len(classes):
            what = f"{len(names)} names for {len(classes)} folders of classes"
            raise UserError(what, self.root / NAMES, "name each folder on a line, in their sorted order")
        self.templates = tuple(t.replace("{c}", "{}") for t in self.lines(TEMPLATES)) or type(self).templates
        found = [(path, name) for f, name in zip(classes, names) for path in _pictures(f)]
        return [Sample(str(p.relative_to(folder)), str(p), [str(p)], "", name, names) for p, name in found]

    def lines(self, name: str) -> list[str]:
        """The lines of a text file of the benchmark; none without the file."""
        path = self.root / name
        if not path.is_file():
            return []
        try:
            return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        except UnicodeDecodeError:
            raise UserError("not a text file", path, "write it as UTF-8") from None

    def aggregate(self, rows: Sequence[Answered]) -> list[Figure]:
        return accuracy_figures(self.name, rows, self.seed)


def _pictures(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
