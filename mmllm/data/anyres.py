"""Large pictures as a thumbnail and tiles (anyres of LLaVA-NeXT, arXiv 2310.03744): which grid, and the cuts."""

from __future__ import annotations

import io
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

from PIL import Image

from mmllm.data.blob import Blob, media_name, media_stamp
from mmllm.data.media import load_image
from mmllm.errors import UserError


@dataclass(frozen=True)
class Tiling:
    """How pictures are cut.

    Attributes:
        max_tiles, min_tiles: of one picture, its thumbnail not counted.
        tile_size: side in pixels of what the tower sees.
    """

    max_tiles: int
    tile_size: int
    min_tiles: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.min_tiles <= self.max_tiles or self.max_tiles < 2:
            raise UserError(f"min_tiles {self.min_tiles} and max_tiles {self.max_tiles} leave nothing to cut", "tiling")

    def to_dict(self) -> dict[str, int]:
        return asdict(self)

    @property
    def grids(self) -> list[tuple[int, int]]:
        """All (rows, columns) that a picture may be cut into, the ones with fewer tiles first."""
        most = range(1, self.max_tiles + 1)
        found = [(r, c) for r in most for c in most if self.min_tiles <= r * c <= self.max_tiles]
        return sorted(found, key=lambda g: (g[0] * g[1], g))

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) for a picture of (width, height): the one that keeps most of its pixels, then wastes least.

        This is the rule by which LLaVA-NeXT chooses among its ``image_grid_pinpoints``.
        """
        return _best(self, size)

    def views(self, grid: tuple[int, int]) -> int:
        """Pictures that the tower sees: one for a picture that is not cut, else the thumbnail and the tiles."""
        tiles = grid[0] * grid[1]
        return 1 if tiles == 1 else 1 + tiles

    def tokens(self, grid: tuple[int, int], each: int) -> int:
        """LLM tokens of a picture whose views have ``each``: all views, and a separator after each row of tiles."""
        return each if grid == (1, 1) else self.views(grid) * each + grid[0]

    def cut(self, image: Image.Image) -> list[Image.Image]:
        """The views of an RGB picture: itself first, then its tiles row by row.

        It is stretched to the tiles' size first, so that they hold all of it and boxes in 0..1 stay true.
        """
        grid = self.grid(image.size)
        if grid == (1, 1):
            return [image]
        rows, columns, side = *grid, self.tile_size
        large = image.resize((columns * side, rows * side), Image.Resampling.BICUBIC)
        places = [(c * side, r * side) for r in range(rows) for c in range(columns)]
        return [image, *(large.crop((x, y, x + side, y + side)) for x, y in places)]


@lru_cache(maxsize=65536)
def _best(tiling: Tiling, size: tuple[int, int]) -> tuple[int, int]:
    width, height = size
    best, chosen = (-1, 0), (1, 1)
    for rows, columns in tiling.grids:
        across, down = columns * tiling.tile_size, rows * tiling.tile_size
        scale = min(across / width, down / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        if (kept, kept - across * down) > best:
            best, chosen = (kept, kept - across * down), (rows, columns)
    return chosen


@dataclass(frozen=True)
class View(Blob):
    """View ``number`` of a picture, 0 the thumbnail, cut when it is read."""

    medium: Any
    tiling: Tiling
    number: int

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"{media_name(self.medium)} tile {self.number}" if self.number else media_name(self.medium)

    def read(self) -> bytes:
        out = io.BytesIO()
        _views(self.medium, self.tiling)[self.number].save(out, "BMP")  # bytes as they are: it is read at once
        return out.getvalue()

    def stamp(self) -> str:
        return f"{media_stamp(self.medium)} view {self.number} of {self.tiling}"


_KEPT: OrderedDict[tuple[str, Tiling], list[Image.Image]] = OrderedDict()
_LOCK = threading.Lock()


def _views(medium: Any, tiling: Tiling) -> list[Image.Image]:
    """The views of a picture; those of the last few are kept, as they are read one after the other."""
    key = (media_stamp(medium), tiling)
    with _LOCK:
        found = _KEPT.get(key)
    if found is None:
        found = tiling.cut(load_image(medium))
        with _LOCK:
            _KEPT[key] = found
            while len(_KEPT) > 4:
                _KEPT.popitem(last=False)
    return found


def views_of(medium: Any, tiling: Tiling, grid: tuple[int, int]) -> Sequence[Any]:
    """What stands for a picture among a tower's pictures; one that is not cut stays what it is."""
    count = tiling.views(grid)
    return [medium] if count == 1 else [View(medium, tiling, number) for number in range(count)]
