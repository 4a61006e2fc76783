"""Strong changes of pictures and of words, for views that a loss compares (arXiv 2002.05709, 1901.11196)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

from mmllm.contracts import Transform
from mmllm.errors import UserError
from mmllm.registry import register

Item = dict[str, Any]
# Words that say little by themselves.
STOP_WORDS = frozenset(
    "a an the of in on at to for with and or but by from as is are was were be been it its this that these those his"
    " her their our your my he she they we you i there here some any".split()
)


def check_p(p: float, name: str) -> float:
    """A probability.

    Raises:
        UserError: it is none.
    """
    if not 0 <= p <= 1:
        raise UserError(f"p must be within 0..1 (got {p})", f"transform '{name}'")
    return p


@register("transform", "colour_distortion")
class ColourDistortion(Transform):
    """Brightness, contrast, saturation and hue by random factors, in random order, with probability ``p``.

    Args:
        brightness, contrast, saturation: factors are drawn within 1 - x and 1 + x.
        hue: largest turn, as a share of the whole circle.
    """

    field = "image"

    def __init__(
        self, brightness: float = 0.4, contrast: float = 0.4, saturation: float = 0.4, hue: float = 0.1, p: float = 0.8
    ):
        self.amounts = {"brightness": brightness, "contrast": contrast, "saturation": saturation}
        if not all(0 <= x <= 1 for x in self.amounts.values()) or not 0 <= hue <= 0.5:
            do = "brightness, contrast and saturation within 0..1, hue within 0..0.5"
            raise UserError("strengths out of range", "transform 'colour_distortion'", do)
        self.hue, self.p = hue, check_p(p, "colour_distortion")

    def __call__(self, item: Item, rng: np.random.Generator) -> Item:
        if "image" not in item or rng.random() >= self.p:
            return item
        image = item["image"].convert("RGB")
        kinds = {"brightness": ImageEnhance.Brightness, "contrast": ImageEnhance.Contrast,
                 "saturation": ImageEnhance.Color}  # fmt: skip
        order = [*kinds, "hue"]
        for name in (order[i] for i in rng.permutation(len(order))):
            if name == "hue":
                image = turned_hue(image, float(rng.uniform(-self.hue, self.hue)))
            else:
                image = kinds[name](image).enhance(1 + float(rng.uniform(-self.amounts[name], self.amounts[name])))
        return {**item, "image": image}


def turned_hue(image: Image.Image, share: float) -> Image.Image:
    """All colours turned by a share of the circle; greys stay."""
    hsv = np.array(image.convert("HSV"))
    hsv[..., 0] += np.uint8(round(share * 256) % 256)  # wraps around, as hue does
    return Image.fromarray(hsv, "HSV").convert("RGB")


@register("transform", "random_grey")
class RandomGrey(Transform):
    """Without colours, with probability ``p``."""

    field = "image"

    def __init__(self, p: float = 0.2):
        self.p = check_p(p, "random_grey")

    def __call__(self, item: Item, rng: np.random.Generator) -> Item:
        if "image" not in item or rng.random() >= self.p:
            return item
        return {**item, "image": item["image"].convert("L").convert("RGB")}


@register("transform", "random_blur")
class RandomBlur(Transform):
    """Gaussian blur with a radius drawn from ``sigma`` (pixels), with probability ``p``."""

    field = "image"

    def __init__(self, p: float = 0.5, sigma: Sequence[float] = (0.1, 2.0)):
        self.p, self.sigma = check_p(p, "random_blur"), sigma

    def __call__(self, item: Item, rng: np.random.Generator) -> Item:
        if "image" not in item or rng.random() >= self.p:
            return item
        radius = float(rng.uniform(self.sigma[0], self.sigma[1]))
        return {**item, "image": item["image"].filter(ImageFilter.GaussianBlur(radius))}


@register("transform", "drop_stop_words")
class DropStopWords(Transform):
    """Leaves out English words that say little by themselves, with probability ``p``; one word remains."""

    field = "text"

    def __init__(self, p: float = 0.8):
        self.p = check_p(p, "drop_stop_words")

    def __call__(self, item: Item, rng: np.random.Generator) -> Item:
        words = str(item.get("text", "")).split()
        if len(words) < 2 or rng.random() >= self.p:
            return item
        kept = [w for w in words if w.lower().strip(",.;:!?") not in STOP_WORDS]
        return {**item, "text": " ".join(kept or words[-1:])}


@register("transform", "swap_words")
class SwapWords(Transform):
    """Two words of a text change places, with probability ``p``."""

    field = "text"

    def __init__(self, p: float = 0.4):
        self.p = check_p(p, "swap_words")

    def __call__(self, item: Item, rng: np.random.Generator) -> Item:
        words = str(item.get("text", "")).split()
        if len(words) < 2 or rng.random() >= self.p:
            return item
        i, j = rng.choice(len(words), 2, replace=False)
        words[i], words[j] = words[j], words[i]
        return {**item, "text": " ".join(words)}


@register("transform", "delete_word")
class DeleteWord(Transform):
    """One word of a text is left out, with probability ``p``; a text of one word stays."""

    field = "text"

    def __init__(self, p: float = 0.2):
        self.p = check_p(p, "delete_word")

    def __call__(self, item: Item, rng: np.random.Generator) -> Item:
        words = str(item.get("text", "")).split()
        if len(words) < 2 or rng.random() >= self.p:
            return item
        del words[int(rng.integers(len(words)))]
        return {**item, "text": " ".join(words)}
