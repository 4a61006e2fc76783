"""Set-of-mark pictures (arXiv 2310.11441): numbers drawn on the things of a picture, and questions by number."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import distance_transform_edt

from mmllm.contracts import DataRecipe
from mmllm.data.blob import Blob, media_name, media_stamp
from mmllm.data.check import box_problems
from mmllm.data.media import load_image, open_image
from mmllm.data.questions import QA, branch, picture_prefix, with_article
from mmllm.errors import UserError, unknown
from mmllm.registry import register

KINDS = ("list", "name", "number")
GRID = 256  # longer side of the masks in which the deepest point is looked for


@dataclass(frozen=True)
class Region:
    """What a number is drawn on.

    Attributes:
        xyxy: its box in 0..1.
        mask: a picture of the same field of view, not black where the thing is; None: the box is all that is known.
    """

    xyxy: tuple[float, float, float, float]
    mask: Any = None


@dataclass(frozen=True)
class MarkedPicture(Blob):
    """A copy of a picture with number k on region k, drawn when it is read.

    Attributes:
        regions: in the order of their numbers, from 1.
        share: height of a number as a share of the picture's shorter side (10 pixels at least).
    """

    medium: Any
    regions: tuple[Region, ...]
    share: float

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"{media_name(self.medium)} with {len(self.regions)} marks"

    def read(self) -> bytes:
        image, out = load_image(self.medium).copy(), io.BytesIO()
        draw_marks(image, self.regions, self.share)
        image.save(out, "PNG", compress_level=1)
        return out.getvalue()

    def stamp(self) -> str:
        masks = [media_stamp(r.mask) for r in self.regions if r.mask is not None]
        return f"{media_stamp(self.medium)} marks 1 {self.share} {[r.xyxy for r in self.regions]} {masks}"


def draw_marks(image: Image.Image, regions: Sequence[Region], share: float) -> list[tuple[int, int, int, int]]:
    """Draws the numbers onto an RGB picture; returns the plate of each in pixels, (x0, y0, x1, y1).

    A number stands on a plate of black or white, whichever differs more from what the plate covers, in the other one.
    """
    draw = ImageDraw.Draw(image)
    height = max(10, round(share * min(image.size)))
    font: Any = ImageFont.load_default(height)
    sizes = [_plate_size(draw, str(number), font, height) for number in range(1, len(regions) + 1)]
    plates = []
    for number, ((x, y), (w, h)) in enumerate(zip(mark_points(image.size, regions, sizes), sizes), 1):
        left = round(min(max(x - w / 2, 0), max(image.width - w, 0)))
        top = round(min(max(y - h / 2, 0), max(image.height - h, 0)))
        plate = (left, top, left + w - 1, top + h - 1)
        back, ink = _colours(image.crop((left, top, left + w, top + h)))
        draw.rectangle(plate, fill=back, outline=ink)
        draw.text((left + w / 2, top + h / 2), str(number), fill=ink, font=font, anchor="mm")
        plates.append(plate)
    return plates


def mark_points(
    size: tuple[int, int], regions: Sequence[Region], plates: Sequence[tuple[int, int]]
) -> list[tuple[float, float]]:
    """Where the numbers stand, (x, y) in pixels: in the middle of a box, at the point of a mask that lies deepest.

    Smaller regions go first; one whose plate would cover another's gets the deepest point that is left to it.
    """
    scale = min(1.0, GRID / max(size))
    grid = (max(1, round(size[0] * scale)), max(1, round(size[1] * scale)))
    inside = [_inside(region, grid) for region in regions]
    points: dict[int, tuple[float, float]] = {}
    for k in sorted(range(len(regions)), key=lambda k: (int(inside[k].sum()), k)):
        x0, y0, x1, y1 = regions[k].xyxy
        point = ((x0 + x1) / 2 * size[0], (y0 + y1) / 2 * size[1])
        if regions[k].mask is not None:
            point = _deepest(inside[k], size)
        if any(_covers(point, plates[k], points[j], plates[j]) for j in points):
            free = inside[k].copy()
            for j, (x, y) in points.items():
                reach = [(a + b) / 2 + 1 for a, b in zip(plates[k], plates[j])]
                across, down = (np.arange(n) + 0.5 for n in grid)
                near = np.abs(across / grid[0] * size[0] - x)[None] < reach[0]
                free &= ~(near & (np.abs(down / grid[1] * size[1] - y)[:, None] < reach[1]))
            point = _deepest(free, size) if free.any() else point
        points[k] = point
    return [points[k] for k in range(len(regions))]


def _covers(a: Sequence[float], plate: Sequence[int], b: Sequence[float], other: Sequence[int]) -> bool:
    return all(abs(p - q) < (m + n) / 2 for p, q, m, n in zip(a, b, plate, other))


def _inside(region: Region, grid: tuple[int, int]) -> np.ndarray:
    """The region as bool [rows, columns]; of a mask only what its box holds, unless that is nothing."""
    columns, rows = grid
    x0, y0, x1, y1 = (round(v * n) for v, n in zip(region.xyxy, (columns, rows) * 2))
    box = np.zeros((rows, columns), dtype=bool)
    box[min(y0, rows - 1) : max(y1, y0 + 1), min(x0, columns - 1) : max(x1, x0 + 1)] = True
    if region.mask is None:
        return box
    mask = np.asarray(open_image(region.mask).convert("L").resize(grid, Image.Resampling.NEAREST)) > 0
    return mask & box if (mask & box).any() else box


def _deepest(inside: np.ndarray, size: tuple[int, int]) -> tuple[float, float]:
    """The point (x, y) in pixels of the picture that is farthest from all that is outside; the edge is outside too."""
    depth = np.asarray(distance_transform_edt(np.pad(inside, 1)))[1:-1, 1:-1]
    rows, columns = np.nonzero(depth >= depth.max() - 1e-6)
    middle = np.argmin((rows - rows.mean()) ** 2 + (columns - columns.mean()) ** 2)  # of equal ones the middle one
    across, down = size[0] / inside.shape[1], size[1] / inside.shape[0]
    return (float(columns[middle]) + 0.5) * across, (float(rows[middle]) + 0.5) * down


def _plate_size(draw: Any, text: str, font: Any, height: int) -> tuple[int, int]:
    x0, y0, x1, y1 = draw.textbbox((0, 0), text, font=font)
    pad = max(2, height // 4)
    return round(x1 - x0) + 2 * pad, round(y1 - y0) + 2 * pad


def _colours(covered: Image.Image) -> tuple[str, str]:
    """Plate and ink: black and white, the plate as far in luminance (WCAG 2) from what it covers as can be."""
    rgb = np.asarray(covered, np.float64).reshape(-1, 3) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    light = float((linear @ (0.2126, 0.7152, 0.0722)).mean())
    return ("black", "white") if (light + 0.05) / 0.05 >= 1.05 / (light + 0.05) else ("white", "black")


@register("data_recipe", "set_of_mark")
class SetOfMark(DataRecipe):
    """Draws numbers on the things of a picture, in random order, and asks for the list and by number.

    Records without boxes pass through, and those with a bad one, which are then rejected with their place. A box may
    bring a ``mask``, a picture that is not black where the thing is.

    Args:
        questions: ``list`` ("1: lion, 2: kite"), ``name`` (of a number), ``number`` (of a name).
        most: things that are marked, drawn at random where there are more.
        share: height of a number as a share of the picture's shorter side.
        seed: of the numbers.
    """

    def __init__(self, questions: Sequence[str] = KINDS, most: int = 20, share: float = 0.08, seed: int = 0):
        for kind in questions:
            if kind not in KINDS:
                raise unknown("question", kind, KINDS, "data recipe 'set_of_mark'")
        if not 0 < share <= 0.5:
            raise UserError(f"share must be above 0 and at most 0.5 (got {share})", "data recipe 'set_of_mark'")
        self.kinds, self.most, self.share, self.seed = list(questions), most, share, seed

    def apply(self, records: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        rng = np.random.default_rng(self.seed)
        for record in records:
            boxes, image = record.get("boxes"), record.get("image")
            if not boxes or not image or next(box_problems(boxes), None) is not None:
                yield record
                continue
            marked = [boxes[i] for i in rng.permutation(len(boxes))[: self.most]]
            regions = tuple(Region(tuple(b["xyxy"]), b.get("mask")) for b in marked)
            picture: Any = MarkedPicture(image, regions, self.share)
            asked = mark_questions([b["text"] for b in marked], self.kinds)
            made = {"messages": picture_prefix([picture]), "branches": [branch(q) for q in asked], "boxes": marked}
            yield {k: v for k, v in record.items() if k not in ("image", "text")} | made


def mark_questions(labels: Sequence[str], kinds: Sequence[str] = KINDS) -> list[QA]:
    """Questions on a picture whose thing ``labels[k]`` bears number k + 1."""
    out: list[QA] = []
    numbered = list(enumerate(labels, 1))
    if "list" in kinds:
        listed = ", ".join(f"{number}: {label}" for number, label in numbered)
        out.append(QA("List the numbered things.", listed, "list"))
    if "name" in kinds:
        out += [QA(f"What is number {number}?", with_article(label), "name") for number, label in numbered]
    if "number" in kinds:
        for label in dict.fromkeys(labels):
            own = ", ".join(str(number) for number, other in numbered if other == label)
            out.append(QA(f"Which number stands on {with_article(label)}?", own, "number"))
    return out
