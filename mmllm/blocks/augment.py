"""Random changes of pictures and log-mel spectrograms, drawn from a given generator so that runs repeat exactly."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageFilter
from torch import Tensor


def place_cutout(
    image: Image.Image, side: int, rng: np.random.Generator | None = None, flip: bool = True
) -> Image.Image:
    """A cut-out (RGBA) on a square canvas of ``side`` pixels, as RGB.

    Args:
        rng: None gives the plain view, centred at 85 % on white; else random background, size, place, flip, colours,
            grey and blur.
        flip: whether mirroring is allowed (not for text-like things).
    """
    picture = image.convert("RGBA")
    scale = 0.85 if rng is None else float(rng.uniform(0.5, 1.0))
    ratio = scale * side / max(picture.size)
    size = (max(1, round(picture.width * ratio)), max(1, round(picture.height * ratio)))
    picture = picture.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)
    colour = (255, 255, 255)
    at = ((side - size[0]) // 2, (side - size[1]) // 2)
    if rng is not None:
        if rng.random() < 0.5:
            colour = tuple(int(c) for c in rng.integers(0, 256, 3))
        at = (int(rng.integers(0, side - size[0] + 1)), int(rng.integers(0, side - size[1] + 1)))
        if flip and rng.random() < 0.5:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if rng.random() < 0.3:
            picture = picture.rotate(float(rng.uniform(-20, 20)), Image.Resampling.BILINEAR)
    canvas = Image.new("RGB", (side, side), colour)
    canvas.paste(picture, at, picture)
    return canvas if rng is None else jitter_picture(canvas, rng)


def jitter_picture(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Colour, brightness, contrast, hue, grey and blur at random strength; geometry stays, so boxes stay true."""
    if rng.random() < 0.7:
        image = ImageEnhance.Brightness(image).enhance(float(rng.uniform(0.7, 1.3)))
        image = ImageEnhance.Contrast(image).enhance(float(rng.uniform(0.7, 1.3)))
        image = ImageEnhance.Color(image).enhance(float(rng.uniform(0.4, 1.6)))
    if rng.random() < 0.3:
        hsv = np.array(image.convert("HSV"))
        hsv[..., 0] += np.uint8(rng.integers(-12, 13) % 256)  # wraps around, as hue does
        image = Image.fromarray(hsv, "HSV").convert("RGB")
    if rng.random() < 0.15:
        image = image.convert("L").convert("RGB")
    if rng.random() < 0.2:
        image = image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.3, 1.2))))
    return image


# Factors of speed. The synthesiser reads a name a third faster than people say it (0.47 and 0.69 s in the starter).
SPEED = (0.6, 1.05)


def augment_log_mel(x: Tensor, generator: torch.Generator, strength: float = 1.0) -> Tensor:
    """Another voice, room and microphone for log-mel power x [B, F, T] (natural log); same shape.

    Per item: speed and place in time, frequency warp (length of the vocal tract), a noise floor, spectral tilt and an
    uneven response. Stronger settings than 1, and masks over time and frequency, made a tower trained for one or
    two minutes learn more slowly without helping on real recordings.

    Args:
        strength: factor on the widths of the warps and of the response.
    """
    b, f, t = x.shape

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator) * (high - low) + low

    def around(width: float, *shape: int) -> Tensor:
        return uniform(-strength * width, strength * width, *shape)

    floor = x.amin((1, 2), keepdim=True)
    # One sampling grid warps time (speed and shift) and frequency (stretch and shift) together.
    time = torch.linspace(-1, 1, t)[None] * uniform(*SPEED, b, 1) + around(0.125, b, 1)
    band = (torch.linspace(-1, 1, f)[None] + 1) * (1 + around(0.05, b, 1)) - 1 + around(0.03, b, 1)
    grid = torch.stack([time[:, None].expand(b, f, t), band[:, :, None].expand(b, f, t)], -1)
    x = F.grid_sample((x - floor)[:, None], grid, align_corners=True)[:, 0] + floor
    # Noise adds in power: per band 39 to 87 dB below the loudest one, with the scatter of a periodogram.
    peak = x.amax((1, 2), keepdim=True)
    grain = -torch.log(-torch.log(torch.rand(b, f, t, generator=generator).clamp(1e-6, 1 - 1e-6)))
    x = torch.logaddexp(x, peak + uniform(-20, -9, b, 1, 1) + 0.5 * grain)
    bumps = torch.randn(b, 1, 8, generator=generator) * 0.5 * strength
    response = F.interpolate(bumps, size=f, mode="linear", align_corners=True).transpose(1, 2)
    return x + torch.linspace(-1, 1, f)[None, :, None] * around(2.0, b, 1, 1) + response
