"""Tiles: single things cut out on a transparent ground, rendered once from many vendors' art to 128-pixel PNG files."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

TILE_SIZE = 128


@dataclass
class Art:
    """One drawing of one thing, not yet rendered.

    Attributes:
        vendor: who drew it ("noto", "fluent", "stamps", ...).
        key: emoji code points ("1F431") or the stamp's path; the same key of two vendors is the same concept.
        label: lower-case English name without an article ("cat").
        category, subgroup: coarse and fine kind, in words ("animals nature", "mammal").
        kind: "svg", "svg_file" or "file"; ``data`` holds the SVG text or the path.
        flip: False when mirroring would make it wrong (writing on it, a hand, a side).
    """

    vendor: str
    key: str
    label: str
    category: str
    subgroup: str
    kind: str
    data: str
    keywords: list[str] = field(default_factory=list)
    flip: bool = True

    @property
    def id(self) -> str:
        return f"{self.vendor}/{re.sub(r'[^A-Za-z0-9_-]+', '-', self.key)}"


@dataclass
class Tile:
    """A rendered tile: what Art says, and where its picture is."""

    id: str
    vendor: str
    key: str
    label: str
    category: str
    subgroup: str
    path: str  # relative to the dataset folder
    keywords: list[str] = field(default_factory=list)
    flip: bool = True

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def rasterise(art: Art, size: int = TILE_SIZE) -> Image.Image:
    """Draws the art, RGBA, trimmed to its visible part and centred on a ``size`` x ``size`` ground.

    Raises:
        ValueError: the file cannot be drawn, or shows nothing.
    """
    if art.kind == "file":
        try:
            with Image.open(art.data) as opened:
                image = opened.convert("RGBA")
        except (OSError, SyntaxError, Image.DecompressionBombError) as e:
            raise ValueError(f"{art.id}: {e}") from None
    else:
        import resvg_py

        try:
            if art.kind == "svg_file":
                raw = resvg_py.svg_to_bytes(svg_path=art.data, width=size)
            else:
                raw = resvg_py.svg_to_bytes(svg_string=art.data, width=size)
        except Exception as e:  # resvg_py raises plain ValueError or a Rust panic, by version
            raise ValueError(f"{art.id}: {e}") from None
        image = Image.open(io.BytesIO(bytes(raw))).convert("RGBA")
    return centre(image, size, art.id)


def visible_box(image: Image.Image, threshold: int) -> tuple[int, int, int, int] | None:
    """Box in pixels around what is more opaque than ``threshold``, or None when nothing is."""
    return image.getchannel("A").point([255 if v > threshold else 0 for v in range(256)]).getbbox()


def centre(image: Image.Image, size: int, name: str = "picture") -> Image.Image:
    """Trims to the visible part, scales the longer side to ``size`` and centres on a square transparent ground.

    Fully transparent pixels are white underneath, so a reader that simply drops the alpha channel sees a white ground.

    Raises:
        ValueError: nothing is visible, or the picture is far too large.
    """
    if image.width * image.height > 50_000_000:
        raise ValueError(f"{name}: {image.width}x{image.height} is too large")
    seen = visible_box(image, 8)
    if seen is None:
        raise ValueError(f"{name}: nothing visible")
    image = image.crop(seen)
    scale = size / max(image.size)
    new = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    if new != image.size:
        image = image.resize(new, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC)
    square = Image.new("RGBA", (size, size), (255, 255, 255, 0))
    square.paste(image, ((size - new[0]) // 2, (size - new[1]) // 2))
    white = Image.new("RGBA", (size, size), (255, 255, 255, 0))
    hidden = square.getchannel("A").point([255] + [0] * 255)
    square.paste(white, (0, 0), hidden)
    return square


def save_tiles(arts: Iterable[Art], folder: Path) -> tuple[list[Tile], list[str]]:
    """Renders and saves tiles as ``folder/tiles/<vendor>/<key>.png``.

    Returns:
        tiles in the order given, and one line for each art that could not be drawn.
    """
    tiles: list[Tile] = []
    problems: list[str] = []
    for art in arts:
        path = Path("tiles") / f"{art.id}.png"
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # old PNGs with odd palettes
                image = rasterise(art)
        except ValueError as e:
            problems.append(str(e))
            continue
        image.save(target, compress_level=1)
        tiles.append(
            Tile(
                art.id,
                art.vendor,
                art.key,
                art.label,
                art.category,
                art.subgroup,
                path.as_posix(),
                art.keywords,
                art.flip,
            )
        )
    return tiles, problems


def tile_loader(folder: Path, limit: int = 4096) -> Callable[[Tile], Image.Image]:
    """A function that loads a tile's RGBA picture and remembers the last ``limit`` of them."""
    memory: dict[str, Image.Image] = {}

    def load(tile: Tile) -> Image.Image:
        if tile.id not in memory:
            if len(memory) >= limit:
                memory.clear()
            with Image.open(folder / tile.path) as opened:
                memory[tile.id] = opened.convert("RGBA")
        return memory[tile.id]

    return load
