"""Media operations that make a view: on pictures before the processor, or on the tensors it returns."""

from __future__ import annotations

import hashlib
import random
from functools import cache

import torch
from PIL import Image, ImageEnhance, ImageFilter
from torch import Tensor

from mmllm.decode.spec import RITUAL_TRANSFORMS, View

# Operations whose result depends on the request's seed; the others give the same view for every request.
SEEDED = frozenset({"diffuse", "rotate", "jitter", "blur", "crop", "random"})
# Operations on processed tensors; all others work on PIL pictures and leave sounds as they are.
TENSOR_OPS = frozenset({"diffuse"})


def view_seed(*parts: object) -> int:
    """A 63-bit seed from the request's seed, the view and the place of the media: stable across runs and machines."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


@cache
def alphas_cumprod() -> Tensor:
    """[1000] signal variance after t + 1 noising steps, float64 (the schedule of the VCD authors).

    The step size runs along a sigmoid up to 0.005, so that even the last step is no pure noise.
    """
    betas = torch.sigmoid(torch.linspace(-6, 6, 1000, dtype=torch.float64)) * (0.5e-2 - 1e-5) + 1e-5
    return torch.cumprod(1 - betas, dim=0)


def diffuse(x: Tensor, step: int, seed: int) -> Tensor:
    """``sqrt(a) x + sqrt(1 - a) noise``; the noise has the standard deviation that normalised pictures have, 1.

    Args:
        x: one processed picture [..., H, W] or spectrogram [..., F, T], float.
        step: 0..999.
    """
    a = float(alphas_cumprod()[step])
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    return (a**0.5 * x.float() + (1 - a) ** 0.5 * noise.to(x.device)).to(x.dtype)


def change_picture(view: View, image: Image.Image, seed: int) -> Image.Image:
    """The picture of a view; sizes stay the same, so that the number of media tokens does too.

    The ranges are those of RITUAL's official code: rotation up to 180 degrees either way, brightness, contrast and
    saturation up to twice, hue up to half a turn, blur with sigma 1.5 to 2, crops of 8 to 100 % of the area.
    """
    rng = random.Random(seed)
    op = rng.choice(RITUAL_TRANSFORMS) if view.op == "random" else view.op
    if op == "hflip":
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if op == "vflip":
        return image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    if op == "rotate":
        return image.rotate(rng.uniform(-180, 180), resample=Image.Resampling.BILINEAR)
    if op == "blur":
        return image.filter(ImageFilter.GaussianBlur(rng.uniform(1.5, 2.0)))
    if op == "jitter":
        return _jitter(image, rng)
    if op == "crop":
        return _random_crop(image, rng)
    if op == "identity":
        return image
    raise ValueError(f"no media operation {op!r}")


def _jitter(image: Image.Image, rng: random.Random) -> Image.Image:
    for enhancer in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = enhancer(image).enhance(rng.uniform(0, 2))
    hue, saturation, value = image.convert("HSV").split()
    shift = rng.randint(-128, 127)
    hue = hue.point([(i + shift) % 256 for i in range(256)])
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


def _random_crop(image: Image.Image, rng: random.Random) -> Image.Image:
    w, h = image.size
    for _ in range(10):
        area, ratio = w * h * rng.uniform(0.08, 1), 2 ** rng.uniform(-0.415, 0.415)  # ratio 3/4..4/3
        cw, ch = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if 0 < cw <= w and 0 < ch <= h:
            x, y = rng.randint(0, w - cw), rng.randint(0, h - ch)
            return image.resize((w, h), Image.Resampling.BILINEAR, box=(x, y, x + cw, y + ch))
    return image
