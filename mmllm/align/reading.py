"""Finds and opens a record's picture or sound, as a tower is going to see it."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from mmllm.blocks.augment import jitter_picture, place_cutout
from mmllm.data.media import load_image, open_image
from mmllm.errors import UserError

FIELD = {"vision": "image", "audio": "audio", "text": "text", "video": "video"}


def medium_of(record: dict[str, Any], modality: str) -> Any:
    """The record's picture or sound, the first of several: a path, bytes or a blob."""
    value = record.get(FIELD[modality])
    if isinstance(value, list) and modality != "video":  # a list of pictures is one video, frame by frame
        value = value[0] if value else None
    if value is None:
        raise UserError(f"record has no {FIELD[modality]}", record.get("id"))
    # One file under two spellings has one set of features.
    return os.path.normpath(value) if isinstance(value, str) else value


def open_picture(record: dict[str, Any], how: str, side: int | None) -> Any:
    """The record's picture: PIL RGB, or with its transparency for a cut-out; ``side`` as in ``open_image``."""
    medium = medium_of(record, "vision")
    return open_image(medium, side) if how == "cutout" else load_image(medium, side)


def view_picture(picture: Any, record: dict[str, Any], how: str, side: int, rng: np.random.Generator | None) -> Any:
    """An opened picture as a tower sees it, PIL RGB; ``rng`` None is the plain view."""
    if how == "cutout":
        return place_cutout(picture, side, rng, not (record.get("meta") or {}).get("nomirror", False))
    return jitter_picture(picture, rng) if how == "scene" and rng is not None else picture


def read_picture(
    record: dict[str, Any], how: str, side: int, rng: np.random.Generator | None, draft: int | None = None
) -> Any:
    """The record's picture as PIL RGB: a cut-out on a canvas, or the picture itself; ``rng`` None is the plain view."""
    return view_picture(open_picture(record, how, draft), record, how, side, rng)


def resized_to(processor: Any, side: int) -> int | None:
    """The largest side, in pixels, that an image processor resizes to: below it no picture should be decoded.

    None for a processor that keeps pictures of their own size (NaFlex).
    """
    sizes = [dict(getattr(processor, name, None) or {}) for name in ("size", "crop_size")]
    known = [v for size in sizes for v in size.values() if isinstance(v, int)]
    return max([side, *known]) if known or hasattr(processor, "image_size") else None
