"""Pictures to pixel_values for our own vision towers, with PIL and numpy only, in the form transformers knows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

RESAMPLE = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def to_rgb(image: Any) -> Image.Image:
    """A PIL picture, array [H, W], [H, W, 3] or [3, H, W] (uint8, or float in 0..1) as PIL RGB; alpha goes on white."""
    if not isinstance(image, Image.Image):
        array = np.asarray(image)
        if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[-1] not in (1, 3, 4):
            array = array.transpose(1, 2, 0)
        if array.dtype != np.uint8:
            array = np.clip(array * 255 if array.max() <= 1 else array, 0, 255).round().astype(np.uint8)
        image = Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array)
    if image.mode in ("RGBA", "LA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, rgba)
    return image.convert("RGB")


class MMLLMImageProcessor(BaseImageProcessor):
    """Resizes to a square of ``image_size`` (the whole picture, so that boxes in 0..1 stay true) and normalises.

    Args:
        image_size: side in pixels.
        image_mean, image_std: of pixel values in 0..1, one number per channel.
    """

    model_input_names = ["pixel_values"]

    def __init__(
        self,
        image_size: int = 192,
        image_mean: Sequence[float] = (127 / 255,) * 3,
        image_std: Sequence[float] = (128 / 255,) * 3,
        resample: str = "bilinear",
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.image_size = int(image_size)
        self.image_mean, self.image_std = [float(m) for m in image_mean], [float(s) for s in image_std]
        self.resample = resample

    def resized(self, image: Any, image_size: int | None = None) -> np.ndarray:
        """One picture as uint8 [3, S, S], which ``preprocess`` takes like any other: the part that needs no batch."""
        side = image_size or self.image_size
        if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.shape == (3, side, side):
            return image
        rgb = to_rgb(image)
        if rgb.size != (side, side):
            rgb = rgb.resize((side, side), RESAMPLE[self.resample])
        return np.ascontiguousarray(np.asarray(rgb).transpose(2, 0, 1))

    def preprocess(
        self, images: Any, return_tensors: str | None = None, image_size: int | None = None, **_: Any
    ) -> BatchFeature:
        """One picture or a list of them -> ``pixel_values`` [B, 3, S, S] float32."""
        side = image_size or self.image_size
        batch = images if isinstance(images, (list, tuple)) else [images]
        mean, std = (np.asarray(v, np.float32)[:, None, None] * 255 for v in (self.image_mean, self.image_std))
        out = np.empty((len(batch), 3, side, side), np.float32)
        for i, image in enumerate(batch):
            np.subtract(self.resized(image, side), mean, out=out[i])
            out[i] /= std
        return BatchFeature({"pixel_values": out}, tensor_type=return_tensors)
