"""Scenes with a planted prior: a thing A is nearly always with its partner B, which is hard to see; and their twins."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageFilter
from pydantic import Field

from mmllm.config import StrictModel
from mmllm.data.backgrounds import KINDS, background
from mmllm.data.scenes import Scene, Thing, arrange, render_thing, tight_box, visible_mask
from mmllm.data.tiles import Tile

# How a set of scenes is drawn: as in training; always with an A; or as in training on the background of another A.
Draw = Literal["natural", "anchored", "swapped"]


class PlantedConfig(StrictModel):
    """Probabilities and looks of planted scenes; lengths are shares of the side.

    Attributes:
        size: side in pixels.
        min_things, max_things: a scene is filled up with clean things to a number drawn from these, one at least.
        anchored: probability that a scene shows an A, which one being drawn evenly.
        together: probability of B given its A; ``stray``: given that its A is absent.
        tied: probability that a scene with an A stands on the background kind of that A.
        smallest, largest: longer side of all things but the partners.
        weak_smallest, weak_largest, weak_opacity: longer side and opacity of the partners.
        noise: standard deviation of the grain over the whole picture, in grey levels.
    """

    size: int = Field(default=224, ge=32)
    min_things: int = Field(default=2, ge=1)
    max_things: int = Field(default=4, ge=1)
    anchored: float = Field(default=0.7, ge=0, le=1)
    together: float = Field(default=0.9, ge=0, le=1)
    stray: float = Field(default=0.05, ge=0, le=1)
    tied: float = Field(default=0.8, ge=0, le=1)
    smallest: float = Field(default=0.32, gt=0, le=1)
    largest: float = Field(default=0.48, gt=0, le=1)
    weak_smallest: float = Field(default=0.1, gt=0, le=1)
    weak_largest: float = Field(default=0.14, gt=0, le=1)
    weak_opacity: float = Field(default=0.55, gt=0, le=1)
    noise: float = Field(default=3.0, ge=0)


@dataclass(frozen=True)
class Prior:
    """What is planted: disjoint ordered pairs (A, B), the things in no pair, and the background kind of each A."""

    pairs: tuple[tuple[str, str], ...]
    clean: tuple[str, ...]

    @property
    def labels(self) -> list[str]:
        return [*(x for pair in self.pairs for x in pair), *self.clean]

    @property
    def partners(self) -> dict[str, str]:
        """A -> B."""
        return dict(self.pairs)

    def kind(self, pair: int) -> str:
        """The background kind that belongs to the A of this pair; with more pairs than kinds, some share one."""
        return KINDS[pair % len(KINDS)]


def plant(labels: Sequence[str], pairs: int, seed: int) -> Prior:
    """Draws ``pairs`` disjoint ordered pairs from the labels, whatever they mean; the rest is clean.

    Raises:
        ValueError: too few labels for so many pairs and one clean thing.
    """
    if len(labels) <= 2 * pairs:
        raise ValueError(f"{len(labels)} labels are too few for {pairs} pairs and a clean thing")
    order = [str(labels[i]) for i in np.random.default_rng((seed, 31)).permutation(len(labels))]
    ends = tuple((order[2 * k], order[2 * k + 1]) for k in range(pairs))
    return Prior(ends, tuple(order[2 * pairs :]))


def split_tiles(pool: Sequence[str], seed: int, label: str) -> dict[str, list[str]]:
    """One thing's cut-outs as disjoint parts: a quarter test, 15 % dev (one each at least), the rest train.

    Raises:
        ValueError: fewer than three cut-outs.
    """
    if len(pool) < 3:
        raise ValueError(f"'{label}' has {len(pool)} cut-outs; three parts need three")
    rng = np.random.default_rng((seed, 32, *label.encode()))
    mixed = [sorted(pool)[i] for i in rng.permutation(len(pool))]
    test, dev = max(1, round(0.25 * len(mixed))), max(1, round(0.15 * len(mixed)))
    return {"test": mixed[:test], "dev": mixed[test : test + dev], "train": mixed[test + dev :]}


@dataclass
class Twins:
    """A scene with the pair's B and the same scene without it; they differ at most in B's pixels.

    Attributes:
        pair: number of the pair whose A is in both.
        differs: [S, S] bool, the pixels that B's cut-out can touch.
    """

    shown: Scene
    hidden: Scene
    pair: int
    differs: np.ndarray


class PlantedComposer:
    """Makes planted scenes; the scene of a seed depends on that seed and the settings alone.

    Args:
        pools: label -> tiles to draw from.
        load: gives a tile's RGBA picture.
        augment: vary the art (training).
    """

    def __init__(
        self,
        prior: Prior,
        pools: Mapping[str, Sequence[Tile]],
        load: Callable[[Tile], Image.Image],
        config: PlantedConfig,
        augment: bool = False,
    ):
        self.prior, self.pools, self.load, self.config, self.augment = prior, pools, load, config, augment
        self.weak = {b for _, b in prior.pairs}

    def scene(self, *seed: int, draw: Draw = "natural") -> Scene:
        """The scene of this seed, for example (data seed, set number, index)."""
        rng = np.random.default_rng((*seed, 0))
        pair = int(rng.integers(len(self.prior.pairs)))
        if draw != "anchored" and rng.random() >= self.config.anchored:
            pair = -1
        partner = pair >= 0 and rng.random() < self.config.together
        return self._compose(rng, seed, pair, partner, draw).shown

    def twins(self, *seed: int) -> Twins:
        """An anchored scene of this seed with and without its B, everything else drawn as in ``scene``."""
        rng = np.random.default_rng((*seed, 0))
        return self._compose(rng, seed, int(rng.integers(len(self.prior.pairs))), True, "anchored")

    def _labels(self, rng: np.random.Generator, pair: int, partner: bool) -> list[str]:
        """What stands in the scene: A and clean things, then strays, then A's own B as the last."""
        c, prior = self.config, self.prior
        strays = [b for k, (_, b) in enumerate(prior.pairs) if k != pair and rng.random() < c.stray]
        named = ([prior.pairs[pair][0]] if pair >= 0 else []) + strays + ([prior.pairs[pair][1]] if partner else [])
        fill = max(1, int(rng.integers(c.min_things, c.max_things + 1)) - len(named))
        chosen = rng.permutation(len(prior.clean))[:fill]
        return [*named[:1], *(prior.clean[int(i)] for i in chosen), *named[1:]]

    def _ground(self, rng: np.random.Generator, pair: int, draw: Draw) -> np.ndarray:
        kinds = KINDS
        if pair >= 0:
            own = self.prior.kind(pair)
            tied = rng.random() < self.config.tied
            if draw == "swapped":
                used = {self.prior.kind(k) for k in range(len(self.prior.pairs))}
                kinds = tuple(k for k in KINDS if k in used - {own}) or tuple(k for k in KINDS if k != own)
            elif tied:
                kinds = (own,)
        return background(rng, self.config.size, kinds)

    def _render(self, seed: tuple[int, ...], place: int, label: str, shrink: float) -> tuple[str, Image.Image]:
        """Tile id and picture of the thing at a place of the list, with a generator of its own."""
        c, rng = self.config, np.random.default_rng((*seed, 1, place))
        pool = self.pools[label]
        tile = pool[int(rng.integers(len(pool)))]
        low, high = (c.weak_smallest, c.weak_largest) if label in self.weak else (c.smallest, c.largest)
        longest = max(8, round(float(rng.uniform(low, high)) * c.size * shrink))
        return tile.id, render_thing(rng, self.load(tile), longest, tile.flip, self.augment)

    def _compose(self, rng: np.random.Generator, seed: tuple[int, ...], pair: int, partner: bool, draw: Draw) -> Twins:
        c, side = self.config, self.config.size
        labels = self._labels(rng, pair, partner)
        ground = self._ground(np.random.default_rng((*seed, 2)), pair, draw)
        grain = np.random.default_rng((*seed, 3)).normal(0, c.noise, (side, side, 1)) if c.noise else 0.0
        shrink, corners, made = 1.0, [None], []
        while None in corners:  # what does not fit is drawn smaller, so that no thing is ever left out
            made = [self._render(seed, i, label, shrink) for i, label in enumerate(labels)]
            area = [picture.width * picture.height for _, picture in made]
            order = sorted(range(len(made)), key=lambda i: -area[i])  # the largest finds room first
            found = arrange(rng, [made[i][1].size for i in order], side)
            corners = [found[order.index(i)] for i in range(len(made))]
            shrink *= 0.9
        canvas = Image.fromarray(ground)
        things: list[Thing] = []
        before = canvas
        for i, label in enumerate(labels):
            corner = corners[i]
            assert corner is not None
            picture = made[i][1]
            mask = visible_mask(picture, corner, side)
            if partner and i == len(labels) - 1:
                before = canvas.copy()
            canvas.paste(picture, corner, self._alpha(picture, label))
            things.append(Thing(label, made[i][0], tight_box(mask), mask))
        shown = Scene(_grained(canvas, grain), things)
        differs = np.zeros((side, side), bool)
        if not partner:
            return Twins(shown, shown, pair, differs)
        (x, y), (w, h) = corners[-1], made[-1][1].size  # type: ignore[misc]
        differs[y : y + h, x : x + w] = True
        return Twins(shown, Scene(_grained(before, grain), things[:-1]), pair, differs)

    def _alpha(self, picture: Image.Image, label: str) -> Image.Image:
        """How strongly each pixel is painted: soft edges for all, and partners see-through."""
        alpha = picture.getchannel("A").filter(ImageFilter.GaussianBlur(0.5))
        if label in self.weak:
            alpha = alpha.point([round(v * self.config.weak_opacity) for v in range(256)])
        return alpha


def _grained(canvas: Image.Image, grain: np.ndarray | float) -> np.ndarray:
    """[S, S, 3] uint8 with the grain added; the same grain for both twins."""
    return np.clip(np.asarray(canvas).astype(np.float32) + grain, 0, 255).round().astype(np.uint8)
