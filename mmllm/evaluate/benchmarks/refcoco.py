"""RefCOCO, RefCOCO+ (Yu et al. 2016, arXiv 1608.00272) and RefCOCOg (Mao et al. 2016): boxes of described things."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mmllm.data.questions import box
from mmllm.errors import UserError
from mmllm.evaluate.benchmarks import parsers
from mmllm.evaluate.benchmarks.base import Answered, Benchmark, Style, split_of
from mmllm.evaluate.benchmarks.files import field, read_json
from mmllm.evaluate.benchmarks.scores import by, slug
from mmllm.evaluate.grounding import iou, parse_boxes, prior_accuracy
from mmllm.evaluate.tasks import Sample, pooled_figures
from mmllm.registry import register
from mmllm.report.figures import Figure

SPLITS = ("val", "testA", "testB", "test")
ASKS = "Please provide the bounding box coordinate of the region this sentence describes: "
FORM = ("Bounding box coordinates are specified in the format (top-left x, top-left y, bottom-right x, "
        "bottom-right y). All values are floating point numbers bounded between 0 and 1. ")  # fmt: skip
PRIOR_BOXES = 400  # the chance level compares all pairs of that many boxes

Box = tuple[float, float, float, float]


class _Plain(pickle.Unpickler):
    """Reads pickles of lists, dicts, strings and numbers; nothing in them can run."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it holds {module}.{name}")


def read_refs(path: Path) -> list[dict[str, Any]]:
    """The list of a ``refs(...).p`` (or the same as JSON).

    Raises:
        UserError: not such a file, or one that holds more than plain data.
    """
    if path.suffix == ".json":
        return read_json(path)
    try:
        with path.open("rb") as f:
            return _Plain(f, encoding="latin1").load()
    except (pickle.UnpicklingError, EOFError, ValueError, IndexError, KeyError, AttributeError) as e:
        raise UserError(f"not a pickle of plain data ({e})", path) from None


def fraction_box(text: str) -> Box | None:
    """The first ``[x0, y0, x1, y1]`` with all four in 0..1, corners put right."""
    found = parsers.four_numbers(text)
    if found is None or any(not 0 <= v <= 1 for v in found):
        return None
    x0, y0, x1, y1 = found
    return min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)


def any_box(text: str) -> Box | None:
    """The first ``[x0, y0, x1, y1]`` as it is."""
    return parsers.four_numbers(text)


def own_box(text: str) -> Box | None:
    """The first ``<box>...</box>`` of integers 0..999."""
    return next(iter(parse_boxes(text)), None)


def _style(words: Callable[[Sample], str], rule: Callable[[str], Box | None]) -> Style:
    return Style(words, lambda text, s: rule(text), 32)


STYLES = {
    "llava": _style(lambda s: f"{ASKS}{s.question}.", fraction_box),
    "lmms": _style(lambda s: f"{FORM}{ASKS}{s.question}", any_box),
    "mmllm": _style(lambda s: box(s.question, (0, 0, 1, 1)).question, own_box),
}
STYLES["official"] = STYLES["llava"]


class Referring(Benchmark):
    """Every expression is one question. Boxes are fractions of the picture as it is, not of one padded to a square.

    The data sets have no official prompt; ``official`` is LLaVA's.
    """

    variants: tuple[str, ...] = ()
    source = "github.com/lichengunc/refer (data) and cocodataset.org (train2014)"
    styles = STYLES

    def read(self) -> list[Sample]:
        names = [f"refs({v}).{end}" for v in self.variants for end in ("p", "json")]
        path = self.need(*names)
        data = read_json(self.need("instances.json"))
        boxes = {a["id"]: a["bbox"] for a in field(data, "annotations", "instances.json")}
        images = {i["id"]: i for i in field(data, "images", "instances.json")}
        out = []
        for ref in read_refs(path):
            if field(ref, "split", path) in SPLITS:
                image = field(images, ref["image_id"], "instances.json")
                gold = _corners(field(boxes, ref["ann_id"], "instances.json"), image["width"], image["height"])
                file = image["file_name"]
                media = self.any_of(f"train2014/{file}", f"images/{file}", file, f"../train2014/{file}",
                                    f"../images/mscoco/images/train2014/{file}")  # fmt: skip
                for s in ref["sentences"]:
                    out.append(Sample(str(s["sent_id"]), str(ref["image_id"]), [media], s["sent"], gold,
                                      meta={"split": ref["split"], "ref": ref["ref_id"]}))  # fmt: skip
        return out

    def judge(self, row: Answered) -> None:
        found, gold = row.parsed, row.sample.gold
        overlap = iou(found, gold) if found else 0.0
        row.hit = float(overlap >= 0.5)
        inside = bool(found) and gold[0] <= (found[0] + found[2]) / 2 <= gold[2] \
            and gold[1] <= (found[1] + found[3]) / 2 <= gold[3]  # fmt: skip
        row.counts = {"iou": overlap, "centre": float(inside)}

    def aggregate(self, rows: Sequence[Answered]) -> list[Figure]:
        out = []
        for split, some in by(rows, lambda r: split_of(r.sample)).items():
            name = f"{slug(self.name.replace('+', 'plus'))}_{split}"
            chance = prior_accuracy([r.sample.gold for r in some if not r.sample.control][:PRIOR_BOXES])
            out += pooled_figures(f"{name}_iou50", some, chance, seed=self.seed, note="chance is another item's box")
            out += pooled_figures(f"{name}_mean_iou", some, seed=self.seed, of=lambda r: (r.counts["iou"], 1.0))[:1]
            out += pooled_figures(f"{name}_centre", some, seed=self.seed, of=lambda r: (r.counts["centre"], 1.0))[:1]
        return out


def _corners(xywh: Sequence[float], width: float, height: float) -> list[float]:
    """Pixels (x, y, width, height) as fractions (x0, y0, x1, y1)."""
    x, y, w, h = xywh
    return [x / width, y / height, (x + w) / width, (y + h) / height]


@register("benchmark", "refcoco")
class RefCoco(Referring):
    """Short expressions of a game with a time limit; testA holds people, testB other things."""

    name = "refcoco"
    variants = ("unc", "google")
    layout = "refs(unc).p, instances.json and the pictures in train2014/"


@register("benchmark", "refcoco+")
class RefCocoPlus(Referring):
    """As RefCOCO, without words of place."""

    name = "refcoco+"
    variants = ("unc",)
    layout = "refs(unc).p, instances.json and the pictures in train2014/"


@register("benchmark", "refcocog")
class RefCocoG(Referring):
    """Longer expressions, written without a game."""

    name = "refcocog"
    variants = ("umd", "google")
    layout = "refs(umd).p, instances.json and the pictures in train2014/"
