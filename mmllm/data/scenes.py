"""Composes scenes from tiles with exact boxes and masks; scene k depends on (seed, ..., k) and on nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from mmllm.config import StrictModel
from mmllm.data.backgrounds import KINDS, background
from mmllm.data.tiles import Tile, visible_box

VISIBLE = 127  # a pixel belongs to a thing when its alpha is above this


class SceneConfig(StrictModel):
    """How scenes look; lengths are shares of the side."""

    size: int = 192  # pixels
    min_things: int = 1
    max_things: int = 3
    smallest: float = 0.28
    largest: float = 0.55
    beta: float = 0.0  # co-occurrence: things of one block are exp(beta) times likelier together
    augment: bool = False


@dataclass
class Thing:
    """One placed thing: its label, the tile, its tight box [x0, y0, x1, y1] in 0..1 and its visible pixels [S, S]."""

    label: str
    tile: str
    xyxy: list[float]
    mask: np.ndarray


@dataclass
class Scene:
    """A composed picture, [S, S, 3] uint8, and what is on it, in the order in which it was painted."""

    image: np.ndarray
    things: list[Thing]

    def boxes(self) -> list[dict[str, Any]]:
        """The record form: ``[{"xyxy": [...], "text": label}]``."""
        return [{"xyxy": t.xyxy, "text": t.label} for t in self.things]


def cooccurrence(blocks: Sequence[str], beta: float) -> np.ndarray:
    """[V, V] weights: exp(beta) for two concepts of one block, 1 otherwise; 0 on the diagonal (no thing twice)."""
    names = np.asarray(blocks)
    weights = np.where(names[:, None] == names[None, :], math.exp(beta), 1.0)
    np.fill_diagonal(weights, 0.0)
    return weights


def draw_concepts(rng: np.random.Generator, n: int, weights: np.ndarray) -> list[int]:
    """``n`` different concepts: the first uniformly, each further one by its weights with those already there."""
    chosen = [int(rng.integers(len(weights)))]
    while len(chosen) < min(n, len(weights)):
        p = weights[chosen].prod(0)
        chosen.append(int(rng.choice(len(weights), p=p / p.sum())))
    return chosen


def place(
    rng: np.random.Generator, sizes: Sequence[tuple[int, int]], side: int, tries: int = 60
) -> list[tuple[int, int] | None]:
    """Top-left corners (x, y) for things of (width, height), without overlap; None for one that found no room."""
    taken: list[tuple[int, int, int, int]] = []
    corners: list[tuple[int, int] | None] = []
    for width, height in sizes:
        corner = None
        for _ in range(tries):
            x, y = int(rng.integers(side - width + 1)), int(rng.integers(side - height + 1))
            if all(x + width <= a or c <= x or y + height <= b or d <= y for a, b, c, d in taken):
                corner = (x, y)
                taken.append((x, y, x + width, y + height))
                break
        corners.append(corner)
    return corners


def arrange(
    rng: np.random.Generator, sizes: Sequence[tuple[int, int]], side: int, attempts: int = 6
) -> list[tuple[int, int] | None]:
    """The first arrangement of ``attempts`` in which all things find room, else the last one; see ``place``."""
    corners: list[tuple[int, int] | None] = []
    for _ in range(attempts):  # an unlucky first place can leave no room for the last thing
        corners = place(rng, sizes, side)
        if None not in corners:
            break
    return corners


def visible_mask(picture: Image.Image, corner: tuple[int, int], side: int) -> np.ndarray:
    """[side, side] bool: where an RGBA picture, pasted with its top-left ``corner`` there, is seen."""
    mask = np.zeros((side, side), bool)
    alpha = np.asarray(picture.getchannel("A"))[: side - corner[1], : side - corner[0]] > VISIBLE
    mask[corner[1] : corner[1] + alpha.shape[0], corner[0] : corner[0] + alpha.shape[1]] = alpha
    return mask


def _hue_matrix(degrees: float) -> np.ndarray:
    """[3, 3] rotation of RGB about its grey axis."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    third, root = (1 - c) / 3, math.sqrt(1 / 3) * s
    near, low, high = c + third, third - root, third + root
    return np.array([[near, low, high], [high, near, low], [low, high, near]], np.float32)


def augment_colours(rng: np.random.Generator, rgb: np.ndarray) -> np.ndarray:
    """Changes of colour, tone and drawing style; [h, w, 3] float32 in 0..255, in and out. Shape and place stay."""
    grey = rgb @ np.array([0.299, 0.587, 0.114], np.float32)
    if rng.random() < 0.07:  # line drawing: dark strokes where the tone changes
        gy, gx = np.gradient(grey)
        rgb = np.repeat(np.clip(255 - 4 * np.hypot(gx, gy), 0, 255)[..., None], 3, -1)
    elif rng.random() < 0.1:
        rgb = np.repeat(grey[..., None], 3, -1)
    else:
        if rng.random() < 0.35:
            rgb = rgb @ _hue_matrix(float(rng.uniform(-28, 28))).T
        if rng.random() < 0.6:
            rgb = grey[..., None] + (rgb - grey[..., None]) * float(rng.uniform(0.35, 1.6))
    if rng.random() < 0.7:
        rgb = (rgb - 128) * float(rng.uniform(0.6, 1.35)) + 128 + float(rng.uniform(-35, 35))
    if rng.random() < 0.3:  # light from one side, as shaded art has it
        h, w = grey.shape
        angle = float(rng.uniform(0, 2 * math.pi))
        slope = np.linspace(-1, 1, w)[None, :] * math.cos(angle) + np.linspace(-1, 1, h)[:, None] * math.sin(angle)
        rgb = rgb * (1 + float(rng.uniform(0.15, 0.45)) * slope[..., None].astype(np.float32))
    if rng.random() < 0.2:
        rgb = rgb * rng.uniform(0.75, 1.25, 3).astype(np.float32)
    if rng.random() < 0.08:
        step = float(rng.integers(32, 80))
        rgb = np.round(rgb / step) * step
    if rng.random() < 0.15:
        rgb = rgb + rng.normal(0, float(rng.uniform(4, 18)), rgb.shape).astype(np.float32)
    return np.clip(rgb, 0, 255)


def render_thing(rng: np.random.Generator, tile: Image.Image, longest: int, flip: bool, augment: bool) -> Image.Image:
    """A tile at its size in the scene, RGBA, trimmed to its visible part.

    Args:
        longest: pixels of the longer side.
        flip: mirroring is allowed.
        augment: also vary shape, tilt, colour, sharpness and outline.
    """
    if flip and rng.random() < 0.5:
        tile = tile.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if augment and rng.random() < 0.35:
        tile = tile.rotate(float(rng.uniform(-16, 16)), Image.Resampling.BILINEAR, expand=True)
    tile = tile.crop(visible_box(tile, VISIBLE) or (0, 0, *tile.size))
    width, height = tile.size
    if augment and rng.random() < 0.35:
        width = max(1, round(width * float(rng.uniform(0.8, 1.25))))
    scale = longest / max(width, height)
    size = (max(8, round(width * scale)), max(8, round(height * scale)))
    if augment and rng.random() < 0.15:  # drawn small and enlarged
        small = float(rng.uniform(0.35, 0.7))
        tile = tile.resize((max(8, int(size[0] * small)), max(8, int(size[1] * small))), Image.Resampling.BILINEAR)
    tile = tile.resize(size, Image.Resampling.BILINEAR)
    if not augment:
        return tile
    pixels = np.asarray(tile)
    rgb = augment_colours(rng, pixels[..., :3].astype(np.float32)).astype(np.uint8)
    tile = Image.fromarray(np.concatenate([rgb, pixels[..., 3:]], -1))
    if rng.random() < 0.15:
        tile = tile.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.5, 1.6))))
    if rng.random() < 0.12:  # a sticker's rim
        alpha = tile.getchannel("A")
        rim = Image.new("RGBA", tile.size, (255, 255, 255, 0) if rng.random() < 0.6 else (20, 20, 20, 0))
        rim.putalpha(alpha.filter(ImageFilter.MaxFilter(5)))
        tile = Image.alpha_composite(rim, tile)
    return tile


class Composer:
    """Makes scenes from a list of concepts and their tiles.

    Args:
        pools: label -> tiles to draw from.
        blocks: label -> coarse kind, for co-occurrence.
        load: gives a tile's RGBA picture.
        photos: [h, w, 3] uint8 photographs, each at least as large as a scene, used for a third of the backgrounds.
    """

    def __init__(
        self,
        pools: Mapping[str, Sequence[Tile]],
        blocks: Mapping[str, str],
        load: Callable[[Tile], Image.Image],
        config: SceneConfig | None = None,
        photos: Sequence[np.ndarray] = (),
    ):
        self.labels = list(pools)
        self.pools = pools
        self.load = load
        self.config = config or SceneConfig()
        self.photos = list(photos)
        self.weights = cooccurrence([blocks[x] for x in self.labels], self.config.beta)

    def _background(self, rng: np.random.Generator) -> np.ndarray:
        side = self.config.size
        if not self.photos or rng.random() >= 1 / 3:
            return background(rng, side, KINDS)
        photo = self.photos[int(rng.integers(len(self.photos)))]
        crop = int(rng.integers(side, min(photo.shape[:2]) + 1))
        y, x = int(rng.integers(photo.shape[0] - crop + 1)), int(rng.integers(photo.shape[1] - crop + 1))
        piece = Image.fromarray(photo[y : y + crop, x : x + crop])
        return np.asarray(piece.resize((side, side), Image.Resampling.BILINEAR))

    def scene(self, *seed: int) -> Scene:
        """The scene of this seed, for example (recipe seed, split number, index)."""
        c, rng = self.config, np.random.default_rng(seed)
        side = c.size
        canvas = Image.fromarray(self._background(rng))
        n = int(rng.integers(c.min_things, c.max_things + 1))
        rendered: list[tuple[str, Tile, Image.Image]] = []
        for k in draw_concepts(rng, n, self.weights):
            pool = self.pools[self.labels[k]]
            tile = pool[int(rng.integers(len(pool)))]
            longest = int(rng.integers(round(c.smallest * side), round(c.largest * side) + 1))
            rendered.append((self.labels[k], tile, render_thing(rng, self.load(tile), longest, tile.flip, c.augment)))
        rendered.sort(key=lambda r: -r[2].width * r[2].height)  # the largest finds room first
        things: list[Thing] = []
        corners = arrange(rng, [r[2].size for r in rendered], side)
        for (label, tile, picture), corner in zip(rendered, corners):
            if corner is None:
                continue
            if c.augment and rng.random() < 0.15:
                dark = picture.getchannel("A").filter(ImageFilter.GaussianBlur(3)).point([v // 2 for v in range(256)])
                canvas.paste((15, 15, 15), (corner[0] + 4, corner[1] + 5), dark)
            canvas.paste(picture, corner, picture)
            mask = visible_mask(picture, corner, side)
            for earlier in things:
                earlier.mask &= ~mask
            things.append(Thing(label, tile.id, tight_box(mask), mask))
        if c.augment and rng.random() < 0.15:
            canvas = canvas.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.3, 1.0))))
        return Scene(np.asarray(canvas), [t for t in things if t.mask.any()])


def tight_box(mask: np.ndarray) -> list[float]:
    """The smallest box around the true pixels, [x0, y0, x1, y1] in 0..1 (x1, y1 exclusive); zeros for an empty mask."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return [0.0, 0.0, 0.0, 0.0]
    height, width = mask.shape
    edges = (columns[0] / width, rows[0] / height, (columns[-1] + 1) / width, (rows[-1] + 1) / height)
    return [round(float(v), 5) for v in edges]
