"""POPE (Li et al. 2023, arXiv 2305.10355) from its files, and POPEv2 with its pairs of with and without the object."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mmllm.evaluate.benchmarks import parsers
from mmllm.evaluate.benchmarks.base import SHORT, YES_NO, Answered, Benchmark, Style
from mmllm.evaluate.benchmarks.files import field, read_json, read_parquet
from mmllm.evaluate.benchmarks.scores import by, grouped, slug, yes_no_figures
from mmllm.evaluate.tasks import Sample, pooled_figures
from mmllm.registry import register
from mmllm.report.figures import Figure

KINDS = ("random", "popular", "adversarial")


def _style(suffix: str, rule: Callable[[str], str | None], tokens: int = 16, note: str | None = None) -> Style:
    return Style(lambda s: s.question + suffix, lambda text, s: rule(text), tokens, note=note)


STYLES = {
    "official": _style("", parsers.yes_no_official, 32, "without no or not in its first sentence it is a yes"),
    "llava": _style(SHORT, parsers.yes_no_official),
    "lmms": _style(SHORT, parsers.yes_no_exact, note="only a bare yes or no counts"),
    "vcd": _style(" Please answer this question with one word.", parsers.yes_no_official),
    "vlmevalkit": _style("", parsers.yes_no_word, 32, "exactly one of the words yes and no counts"),
}


@register("benchmark", "pope")
class Pope(Benchmark):
    """Each of the three files is a split; what they ask about one picture in the same words is asked once."""

    name = "pope"
    folders = ("POPE",)
    pictures = "coco"
    layout = "coco_pope_{random,popular,adversarial}.json (there or in a folder below) and COCO's val2014/"
    source = "github.com/AoiDragon/POPE (output/coco) and cocodataset.org (val2014)"
    styles = STYLES
    closed = True

    def read(self) -> list[Sample]:
        found = {k: sorted(self.root.glob(f"**/{self.pictures}_pope*{k}.json")) for k in KINDS}
        if not any(found.values()):
            raise self.lacks(f"{self.pictures}_pope_random.json")
        return [self._sample(row, kind, files[0]) for kind, files in found.items() if files
                for row in read_json(files[0])]  # fmt: skip

    def _sample(self, row: dict[str, Any], kind: str, path: Path) -> Sample:
        image = str(field(row, "image", path))
        media = self.any_of(f"val2014/{image}", f"images/{image}", image, f"coco/val2014/{image}",
                            f"../gqa/images/{image}")  # fmt: skip
        return Sample(str(field(row, "question_id", path)), image, [media], str(field(row, "text", path)).strip(),
                      str(field(row, "label", path)).strip().lower(), YES_NO, meta={"split": kind})  # fmt: skip

    def aggregate(self, rows: Sequence[Answered]) -> list[Figure]:
        out: list[Figure] = []
        for split, some in by(rows, lambda r: r.sample.meta["split"]).items():
            out += yes_no_figures(f"{self.name}_{slug(split)}", some, self.seed, lmms=self.style_name == "lmms")
        return out


@register("benchmark", "pope_aokvqa")
class PopeAokvqa(Pope):
    """POPE on pictures of A-OKVQA, whose contents SEEM found."""

    name = "pope_aokvqa"
    pictures = "aokvqa"
    layout = "aokvqa_pope_seem_{random,popular,adversarial}.json and COCO's val2014/"
    source = "github.com/AoiDragon/POPE (output/seem/aokvqa) and cocodataset.org (val2014)"


@register("benchmark", "pope_gqa")
class PopeGqa(Pope):
    """POPE on pictures of GQA, whose contents SEEM found."""

    name = "pope_gqa"
    pictures = "gqa"
    layout = "gqa_pope_seem_{random,popular,adversarial}.json and GQA's images/ (or gqa/images beside it)"
    source = "github.com/AoiDragon/POPE (output/seem/gqa) and cs.stanford.edu/people/dorarad/gqa"


@register("benchmark", "popev2")
class PopeV2(Benchmark):
    """Pairs of a picture with an object and the same picture without it; a pair is right when both answers are."""

    name = "popev2"
    folders = ("POPEv2",)
    layout = "annotations.json (there or in dataset/), images/ from images.zip and COCO's train2017/; or test.parquet"
    source = "github.com/AoiDragon/POPE (POPEv2/dataset), or huggingface.co/datasets/Monosail/POPEv2 (parquet)"
    styles = STYLES
    closed = True

    def read(self) -> list[Sample]:
        path = self.need("annotations.json", "dataset/annotations.json", "test*.parquet", "*.parquet", "*.json")
        return self._parquet(path) if path.suffix == ".parquet" else self._json(path)

    def _json(self, path: Path) -> list[Sample]:
        out = []
        for index, row in enumerate(read_json(path)):
            name = str(field(row, "image_name", path)).lstrip("/")
            picture = str(field(row, "image_id", path))
            media = self.any_of(name.removeprefix("coco/"), name, f"dataset/{name}", f"images/{name}")
            out.append(Sample(str(index), picture, [media],
                              str(field(row, "query", path)), str(field(row, "label", path)).strip().lower(), YES_NO,
                              meta={"pair": f"{picture} {field(row, 'target_object', path)}"}))  # fmt: skip
        return out

    def _parquet(self, path: Path) -> list[Sample]:
        out = []
        for row in read_parquet(path):
            pair = str(field(row, "example_id", path))
            for side in ("normal", "counterfactual"):
                picture = self.keep_picture(field(row, f"{side}_image", path)["bytes"], pair)
                label = str(field(row, f"{side}_label", path)).strip().lower()
                out.append(Sample(f"{pair}:{side}", str(field(row, "image_id", path)), [picture],
                                  str(field(row, "question", path)), label, YES_NO, meta={"pair": pair}))  # fmt: skip
        return out

    def aggregate(self, rows: Sequence[Answered]) -> list[Figure]:
        pairs = grouped(rows, lambda r: r.sample.meta["pair"])
        out = yes_no_figures("popev2", rows, self.seed, lmms=self.style_name == "lmms")
        return out + pooled_figures("popev2_pair_accuracy", pairs, 0.25, seed=self.seed, note="both pictures right")
