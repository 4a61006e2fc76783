"""Transforms of records with loaded media: pictures together with their boxes, waves, and words.

Each is a ``Transform``: an item ``{"image": PIL RGB, "boxes", "audio": wave [T], "text": str}`` and a generator in, a
new item out; fields that are missing are left alone. Log-mel features have their own in ``mmllm.blocks.augment``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from mmllm.blocks.augment import jitter_picture
from mmllm.contracts import Transform
from mmllm.errors import UserError
from mmllm.registry import make, register

Item = dict[str, Any]


def build_transforms(specs: Sequence[str | dict[str, Any]], where: object = "transforms") -> Chain:
    """A chain of transforms from their names, or ``{"type": NAME, **options}``.

    Raises:
        UserError: unknown name or option.
    """
    return Chain([make("transform", spec, where) for spec in specs])


class Chain(Transform):
    """One transform after the other."""

    def __init__(self, transforms: Sequence[Transform]):
        self.transforms = list(transforms)
        self.fields = {t.field for t in transforms}

    def __call__(self, item: Item, rng: np.random.Generator) -> Item:
        for transform in self.transforms:
            item = transform(item, rng)
        return item


# ---- pictures ----


@register("transform", "random_resized_crop")
class RandomResizedCrop(Transform):
    """A random part of the picture, resized to a square (arXiv 1409.4842); boxes follow.

    Args:
        size: side in pixels; None leaves the part as large as it is.
        scale: smallest and largest share of the area.
        ratio: narrowest and widest proportion of width to height.
        keep: a box of which a smaller share remains in the part is dropped.
    """

    field = "image"

    def __init__(
        self,
        size: int | None = None,
        scale: Sequence[float] = (0.5, 1.0),
        ratio: Sequence[float] = (3 / 4, 4 / 3),
        keep: float = 0.4,
    ):
        if not 0 < scale[0] <= scale[1] <= 1:
            raise UserError(f"scale must rise within 0..1 (got {list(scale)})", "transform 'random_resized_crop'")
        self.size, self.scale, self.ratio, self.keep = size, scale, ratio, keep

    def __call__(self, item: Item, rng: np.random.Generator) -> Item:
        if "image" not in item:
            return item
        image = item["image"]
        area = float(rng.uniform(self.scale[0], self.scale[1])) * image.width * image.height
        shape = float(np.exp(rng.uniform(*np.log(self.ratio))))
        width = int(np.clip(round((area * shape) ** 0.5), 1, image.width))
        height = int(np.clip(round((area / shape) ** 0.5), 1, image.height))
        left, top = int(rng.integers(image.width - width + 1)), int(rng.integers(image.height - height + 1))
        part = image.crop((left, top, left + width, top + height))
        if self.size is not None:
            part = part.resize((self.size, self.size), Image.Resampling.BICUBIC)
        x, y, w, h = left / image.width, top / image.height, width / image.width, height / image.height
        corner, extent = np.array([x, y, x, y]), np.array([w, h, w, h])
        boxes = []
        for box in item.get("boxes") or []:
            moved = (np.array(box["xyxy"], float) - corner) / extent
            clipped = np.clip(moved, 0, 1)
            left_over = np.prod(clipped[2:] - clipped[:2]) / max(np.prod(moved[2:] - moved[:2]), 1e-12)
            if left_over >= self.keep:
                boxes.append({**box, "xyxy": clipped.tolist()})
        return {**item, "image": part, **({"boxes": boxes} if item.get("boxes") is not None else {})}


@register("transform", "horizontal_flip")
class HorizontalFlip(Transform):
    """Mirrors picture and boxes; not where ``meta.nomirror`` says that left and right matter."""

    field = "image"

    def __init__(self, p: float = 0.5):
        self.p = p

    def __call__(self, item: Item, rng: np.random.Generator) -> Item:
        if "image" not in item or rng.random() >= self.p or (item.get("meta") or {}).get("nomirror"):
            return item
        out = {**item, "image": item["image"].transpose(Image.Transpose.FLIP_LEFT_RIGHT)}
        if item.get("boxes") is not None:
            out["boxes"] = [
                {**b, "xyxy": [1 - b["xyxy"][2], b["xyxy"][1], 1 - b["xyxy"][0], b["xyxy"][3]]} for b in item["boxes"]
            ]
        return out


@register("transform", "colour_jitter")
class ColourJitter(Transform):
    """Colours, brightness, contrast, grey and blur (``jitter_picture``); geometry stays."""

    field = "image"

    def __call__(self, item: Item, rng: np.random.Generator) -> Item:
        return {**item, "image": jitter_picture(item["image"], rng)} if "image" in item else item


# ---- sounds ----


@register("transform", "wave_crop")
class WaveCrop(Transform):
    """A random stretch of ``samples`` samples; a shorter sound is put at a random place in silence."""

    field = "audio"

    def __init__(self, samples: int):
        self.samples = samples

    def __call__(self, item: Item, rng: np.random.Generator) -> Item:
        if "audio" not in item:
            return item
        wave = item["audio"]
        spare = len(wave) - self.samples
        at = int(rng.integers(abs(spare) + 1))
        cut = wave[at : at + self.samples] if spare >= 0 else np.pad(wave, (at, -spare - at))
        return {**item, "audio": cut}


@register("transform", "wave_gain")
class WaveGain(Transform):
    """Louder or softer by up to ``decibels``, and never beyond full scale."""

    field = "audio"

    def __init__(self, decibels: float = 6.0):
        self.decibels = decibels

    def __call__(self, item: Item, rng: np.random.Generator) -> Item:
        if "audio" not in item:
            return item
        factor = 10 ** (float(rng.uniform(-self.decibels, self.decibels)) / 20)
        peak = float(np.abs(item["audio"]).max(initial=0.0)) * factor
        return {**item, "audio": (item["audio"] * (factor / max(peak, 1.0))).astype(np.float32)}


@register("transform", "wave_noise")
class WaveNoise(Transform):
    """White noise at a signal-to-noise ratio drawn between the two of ``decibels``."""

    field = "audio"

    def __init__(self, decibels: Sequence[float] = (10.0, 40.0)):
        self.decibels = decibels

    def __call__(self, item: Item, rng: np.random.Generator) -> Item:
        if "audio" not in item:
            return item
        wave, (low, high) = item["audio"], self.decibels
        power = float(np.mean(np.square(wave, dtype=np.float64))) if len(wave) else 0.0
        noise = rng.normal(size=len(wave)) * (power / 10 ** (float(rng.uniform(low, high)) / 10)) ** 0.5
        return {**item, "audio": (wave + noise).astype(np.float32)}


# ---- texts ----


@register("transform", "word_dropout")
class WordDropout(Transform):
    """Leaves each word out with probability ``p`` (arXiv 1901.11196); at least one remains."""

    field = "text"

    def __init__(self, p: float = 0.1):
        self.p = p

    def __call__(self, item: Item, rng: np.random.Generator) -> Item:
        words = str(item.get("text", "")).split()
        if len(words) < 2:
            return item
        kept = rng.random(len(words)) >= self.p
        kept[rng.integers(len(words))] = True
        return {**item, "text": " ".join(w for w, k in zip(words, kept, strict=True) if k)}


@register("transform", "random_sentence")
class RandomSentence(Transform):
    """One sentence of a longer text, with probability ``p``."""

    field = "text"

    def __init__(self, p: float = 1.0):
        self.p = p

    def __call__(self, item: Item, rng: np.random.Generator) -> Item:
        sentences = [s for s in re.split(r"(?<=[.!?。])\s+", str(item.get("text", "")).strip()) if s]
        if len(sentences) < 2 or rng.random() >= self.p:
            return item
        return {**item, "text": sentences[rng.integers(len(sentences))]}
