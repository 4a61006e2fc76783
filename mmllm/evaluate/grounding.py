"""Boxes in text and their overlap: `<box>x0,y0,x1,y1</box>` with integers 0..999, accuracy at IoU 0.5."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from mmllm.data.questions import BOX_SCALE, SIDES, box, side
from mmllm.evaluate.tasks import EvalData, EvalTask, Row, Sample, pooled_figures
from mmllm.registry import register
from mmllm.report.figures import Figure

Box = tuple[float, float, float, float]
_BOX = re.compile(r"<box>\s*(\d{1,4})\s*,\s*(\d{1,4})\s*,\s*(\d{1,4})\s*,\s*(\d{1,4})\s*</box>")


def parse_boxes(text: str) -> list[Box]:
    """All well-formed boxes of an answer as (x0, y0, x1, y1) in 0..1.

    Corners in the wrong order are put right; numbers above 999 are cut to the edge; anything else is no box.
    """
    boxes = []
    for match in _BOX.finditer(text):
        x0, y0, x1, y1 = (min(int(v), BOX_SCALE) / BOX_SCALE for v in match.groups())
        boxes.append((min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)))
    return boxes


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes (x0, y0, x1, y1); 0 when they are disjoint or have no area."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    overlap = max(width, 0.0) * max(height, 0.0)
    area = sum(max(x[2] - x[0], 0.0) * max(x[3] - x[1], 0.0) for x in (a, b))
    return overlap / (area - overlap) if overlap > 0 else 0.0


def answer_iou(answer: str, truth: Sequence[float]) -> float:
    """IoU of the first box in an answer with the true one; no box gives 0."""
    boxes = parse_boxes(answer)
    return iou(boxes[0], truth) if boxes else 0.0


def prior_accuracy(truths: Sequence[Sequence[float]], threshold: float = 0.5) -> float:
    """What answering with a box drawn from the other items' truths gets: the chance level of box accuracy."""
    n = len(truths)
    if n < 2:
        return 0.0
    hits = sum(iou(truths[i], truths[j]) >= threshold for i in range(n) for j in range(i + 1, n))
    return 2 * hits / (n * (n - 1))


@register("task", "box")
class BoxTask(EvalTask):
    """Where is one named thing of a scene? Right when the first box of the answer overlaps with IoU at least 0.5."""

    max_new_tokens = 32
    limit = 200
    threshold = 0.5

    @classmethod
    def splits(cls, data: EvalData) -> list[str]:
        return data.splits()[:1]

    def samples(self) -> list[Sample]:
        out = []
        for index, scene in enumerate(self.data.scenes(self.split)[: self.limit]):
            rng = np.random.default_rng((self.data.seed, index, 2))
            if not scene["boxes"]:
                continue
            thing = scene["boxes"][int(rng.integers(len(scene["boxes"])))]
            out.append(Sample(str(scene["id"]), str(scene["id"]), [str(scene["image"])],
                              box(thing["text"], thing["xyxy"]).question, list(thing["xyxy"]),
                              meta={"object": thing["text"]}))  # fmt: skip
        return out

    def judge(self, row: Row) -> None:
        overlap = answer_iou(row.answer, row.sample.gold)
        row.hit = float(overlap >= self.threshold)
        row.counts = {"iou": overlap, "has_box": float(bool(parse_boxes(row.answer)))}

    def aggregate(self, rows: Sequence[Row]) -> list[Figure]:
        suffix, seed = "" if self.split == "seen" else f"_{self.split}", self.data.seed
        chance = prior_accuracy([r.sample.gold for r in rows if not r.sample.control], self.threshold)
        figures = pooled_figures(f"box_accuracy_iou50{suffix}", rows, chance, seed=seed,
                                 note="chance is another scene's true box")  # fmt: skip
        return (
            figures + pooled_figures(f"box_mean_iou{suffix}", rows, seed=seed, of=lambda r: (r.counts["iou"], 1.0))[:1]
        )


@register("task", "side")
class SideTask(EvalTask):
    """Is a named thing on the left or on the right? Things in the middle are not asked about."""

    limit = 300

    def samples(self) -> list[Sample]:
        out = []
        for index, scene in enumerate(self.data.scenes(self.split)[: self.limit]):
            order = np.random.default_rng((self.data.seed, index, 3)).permutation(len(scene["boxes"]))
            things = [scene["boxes"][i] for i in order]
            asked = next(((t, q) for t in things if (q := side(t["text"], t["xyxy"]))), None)
            if asked:
                thing, qa = asked
                out.append(Sample(str(scene["id"]), str(scene["id"]), [str(scene["image"])], qa.question, qa.answer,
                                  list(SIDES), meta={"object": thing["text"]}))  # fmt: skip
        return out

    def aggregate(self, rows: Sequence[Row]) -> list[Figure]:
        return pooled_figures(f"side_accuracy_{self.split}", rows, 0.5, seed=self.data.seed)
