"""Media operations that make a view: on pictures and sounds before the processor, or on the tensors it returns."""

from __future__ import annotations

import hashlib
import random
from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter
from torch import Tensor

from mmllm.decode.ops import OPS
from mmllm.decode.presets import RITUAL_TRANSFORMS
from mmllm.decode.spec import Op
from mmllm.errors import UserError

# Operations on processed tensors; all others work on pictures and waves.
TENSOR_OPS = frozenset({"diffuse"})


def view_seed(*parts: object) -> int:
    """A 63-bit seed from the request's seed, the view and the place of the media: stable across runs and machines."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def applies(op: Op, kind: str) -> bool:
    """Whether an operation changes media of a kind, ``image`` or ``audio``."""
    return OPS[op.name].stage in ("media", {"image": "picture", "audio": "sound"}[kind]) and op.name != "identity"


def seeded(ops: tuple[Op, ...]) -> bool:
    """Whether any of them draws from the seed."""
    return any(OPS[op.name].seeded for op in ops)


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


def diffuse_tensors(tensors: dict[str, Tensor], step: int, seed: int) -> dict[str, Tensor]:
    """Noise on the picture or spectrogram of one medium, masks left alone.

    Spectrograms are not always normalised to unit variance as pictures are, so they are scaled to it and back: the
    signal-to-noise ratio of a step is then the same for both.
    """
    changed = dict(tensors)
    for key in ("pixel_values", "input_features"):
        if key in tensors:
            x = tensors[key]
            scale = 1.0 if key == "pixel_values" else float(x.float().std()) or 1.0
            changed[key] = diffuse(x / scale, step, seed) * scale
    return changed


def change_picture(op: Op, image: Image.Image, seed: int) -> Image.Image:
    """The picture after one operation; sizes stay the same, so that the number of media tokens does too.

    The ranges are those of RITUAL's official code: rotation up to 180 degrees either way, brightness, contrast and
    saturation up to twice, hue up to half a turn, blur with sigma 1.5 to 2, crops of 8 to 100 % of the area.
    """
    rng = random.Random(seed)
    if op.name == "random":
        from mmllm.decode.ops import op as make

        op = make(rng.choice(RITUAL_TRANSFORMS))
    name = op.name
    if name == "hflip":
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if name == "vflip":
        return image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    if name == "rotate":
        degrees = rng.uniform(-180, 180) if op["degrees"] is None else op["degrees"]
        return image.rotate(degrees, resample=Image.Resampling.BILINEAR)
    if name == "blur":
        return image.filter(ImageFilter.GaussianBlur(rng.uniform(1.5, 2.0) if op["sigma"] is None else op["sigma"]))
    if name == "jitter":
        return _jitter(image, rng, op["strength"])
    if name == "crop":
        return _random_crop(image, rng, op["smallest"])
    if name == "blank":
        return Image.new("RGB", image.size, _fill(np.asarray(image), op["fill"]))
    if name in ("patch_shuffle", "patch_mask"):
        return Image.fromarray(_tiles(op, np.asarray(image), seed))
    raise ValueError(f"no operation on pictures: {name!r}")


def change_sound(op: Op, wave: np.ndarray, seed: int) -> np.ndarray:
    """The wave [T] float32 after one operation, of the same length."""
    if op.name in ("silence", "blank"):
        return np.zeros_like(wave)
    if op.name == "time_reverse":
        return wave[::-1].copy()
    rng = np.random.default_rng(seed)
    if op.name == "noise":
        power = float(np.mean(np.square(wave, dtype=np.float64))) / 10 ** (op["snr"] / 10)
        return (wave + rng.standard_normal(len(wave)) * power**0.5).astype(np.float32)
    if op.name in ("patch_shuffle", "patch_mask"):
        pieces = np.array_split(wave, op["grid"])
        if op.name == "patch_shuffle":
            return np.concatenate([pieces[i] for i in rng.permutation(len(pieces))])
        hidden = set(rng.permutation(len(pieces))[: round(op["ratio"] * len(pieces))].tolist())
        return np.concatenate([np.zeros_like(p) if i in hidden else p for i, p in enumerate(pieces)])
    raise ValueError(f"no operation on sounds: {op.name!r}")


def change_tensors(op: Op, tensors: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """One operation on processed pixels [1, C, H, W], for media that come without their picture.

    Raises:
        UserError: the operation needs the picture itself, or the pixels do not lie on one grid.
    """
    if op.name == "diffuse":
        return diffuse_tensors(tensors, op["step"], seed)
    x = tensors.get("pixel_values")
    if x is None or x.dim() != 4 or op.name not in ("hflip", "vflip", "blank", "patch_shuffle", "patch_mask"):
        raise UserError(f"'{op.name}' needs the picture itself", "decode", "use mmllm.decode.Decoder with messages")
    if op.name in ("hflip", "vflip"):
        return {**tensors, "pixel_values": x.flip(-1 if op.name == "hflip" else -2)}
    if op.name == "blank":
        # Black and white are the darkest and brightest that the picture has, since its normalisation is not known here.
        level = (
            x.mean((-1, -2), keepdim=True) if op["fill"] == "mean" else x.min() if op["fill"] == "black" else x.max()
        )
        return {**tensors, "pixel_values": level.expand_as(x).clone()}
    tiles = _tiles(op, x[0].permute(1, 2, 0).float().cpu().numpy(), seed)
    return {**tensors, "pixel_values": torch.from_numpy(tiles).permute(2, 0, 1)[None].to(x)}


def _tiles(op: Op, picture: np.ndarray, seed: int) -> np.ndarray:
    """The picture [H, W, C] with ``grid`` x ``grid`` equal tiles shuffled or masked; a rest at the edges stays."""
    grid, (height, width) = op["grid"], picture.shape[:2]
    h, w = height // grid, width // grid
    if not h or not w:
        raise UserError(f"grid={grid} is finer than the picture, {width} x {height}", f"decode {op.name}")
    rng = np.random.default_rng(seed)
    places = [(r * h, c * w) for r in range(grid) for c in range(grid)]
    order = rng.permutation(len(places))
    out = picture.copy()
    if op.name == "patch_shuffle":
        for (y, x), source in zip(places, order):
            y0, x0 = places[source]
            out[y : y + h, x : x + w] = picture[y0 : y0 + h, x0 : x0 + w]
        return out
    colour = picture.reshape(-1, picture.shape[-1]).mean(0)
    for k in order[: round(op["ratio"] * len(places))]:
        y, x = places[k]
        out[y : y + h, x : x + w] = colour.astype(picture.dtype)
    return out


def _fill(picture: np.ndarray, fill: str) -> Any:
    if fill == "mean":
        return tuple(int(c) for c in picture.reshape(-1, 3).mean(0).round())
    return (0, 0, 0) if fill == "black" else (255, 255, 255)


def _jitter(image: Image.Image, rng: random.Random, strength: float) -> Image.Image:
    for enhancer in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = enhancer(image).enhance(1 + strength * rng.uniform(-1, 1))
    shift = round(strength * rng.randint(-128, 127))
    if not shift:
        return image
    hue, saturation, value = image.convert("HSV").split()
    hue = hue.point([(i + shift) % 256 for i in range(256)])
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


def _random_crop(image: Image.Image, rng: random.Random, smallest: float) -> Image.Image:
    w, h = image.size
    for _ in range(10):
        area, ratio = w * h * rng.uniform(smallest, 1), 2 ** rng.uniform(-0.415, 0.415)  # ratio 3/4..4/3
        cw, ch = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if 0 < cw <= w and 0 < ch <= h:
            x, y = rng.randint(0, w - cw), rng.randint(0, h - ch)
            return image.resize((w, h), Image.Resampling.BILINEAR, box=(x, y, x + cw, y + ch))
    return image
