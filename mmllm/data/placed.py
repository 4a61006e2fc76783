"""Single things placed on a canvas in a known size: pictures with an exact ordinal label."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from mmllm.contracts import DataRecipe
from mmllm.data.blob import Blob, media_name, media_stamp
from mmllm.data.media import open_image
from mmllm.errors import UserError
from mmllm.registry import register


@dataclass(frozen=True)
class PlacedPicture(Blob):
    """A picture (a cut-out keeps its transparency) on a plain canvas, made when it is read.

    Attributes:
        side: of the canvas in pixels; ``box``: (x0, y0, x1, y1) of the thing in pixels.
        colour: of the canvas, RGB.
    """

    medium: Any
    side: int
    box: tuple[int, int, int, int]
    colour: tuple[int, int, int]

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"{media_name(self.medium)} at {self.box}"

    def read(self) -> bytes:
        x0, y0, x1, y1 = self.box
        thing = open_image(self.medium).convert("RGBA").resize((x1 - x0, y1 - y0))
        canvas = Image.new("RGB", (self.side, self.side), self.colour)
        canvas.paste(thing, (x0, y0), thing)
        out = io.BytesIO()
        canvas.save(out, "PNG", compress_level=1)
        return out.getvalue()

    def stamp(self) -> str:
        return f"{media_stamp(self.medium)} {self.side} {self.box} {self.colour}"


@register("data_recipe", "placed")
class Placed(DataRecipe):
    """Puts each picture on a canvas in a drawn size and place, and writes the size into ``meta``.

    Args:
        side: of the canvas in pixels.
        sizes: smallest and largest side of the thing, as a share of the canvas.
        steps: how many steps of ``meta.FIELD``, a whole number, are the whole canvas.
        field: name in ``meta``.
        seed: of sizes, places and light canvas colours.
    """

    def __init__(
        self,
        side: int = 128,
        sizes: Sequence[float] = (0.25, 1.0),
        steps: int = 20,
        field: str = "size",
        seed: int = 0,
    ):
        if len(sizes) != 2 or not 0 < sizes[0] <= sizes[1] <= 1:
            raise UserError(f"sizes must be two shares of the canvas, the smaller first (got {list(sizes)})", "placed")
        self.side, self.low, self.high = side, float(sizes[0]), float(sizes[1])
        self.steps, self.field, self.seed = steps, field, seed

    def apply(self, records: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        rng = np.random.default_rng(self.seed)
        for record in records:
            long = max(1, round(rng.uniform(self.low, self.high) * self.side))
            x, y = (int(v) for v in rng.integers(0, self.side - long + 1, 2))
            light = tuple(int(v) for v in rng.integers(190, 256, 3))
            if not record.get("image"):
                continue
            blob = PlacedPicture(record["image"], self.side, (x, y, x + long, y + long), light)  # type: ignore[arg-type]
            share = {self.field: round(long / self.side * self.steps)}
            yield {**record, "image": blob, "meta": {**(record.get("meta") or {}), **share}}
