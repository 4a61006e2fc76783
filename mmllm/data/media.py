"""Opens pictures and sounds, and says in one line what is wrong with a file that is neither."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from mmllm.blocks.sound import resample
from mmllm.data.blob import Blob, media_file, media_name
from mmllm.errors import UserError

MAX_PIXELS = 2**30 // 12  # Pillow's own limit (a quarter GiB of RGB): above it a picture is a decompression bomb
MAX_SECONDS = 3600.0
Medium = str | Path | bytes | Blob | BinaryIO


def load_image(path: Medium, side: int | None = None) -> Image.Image:
    """The picture as PIL RGB, transparency on white.

    Args:
        path: a path, encoded bytes, a blob or an open file.
        side: see ``open_image``.

    Raises:
        UserError: missing, not a picture, truncated, empty or larger than ``MAX_PIXELS``.
    """
    image = open_image(path, side)
    if image.mode in ("RGBA", "LA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba).convert("RGB")
    return image.convert("RGB")


def open_image(path: Medium, side: int | None = None) -> Image.Image:
    """The decoded picture in its own mode (a cut-out keeps its transparency); errors as in ``load_image``.

    Args:
        side: what the picture is going to be resized to. A JPEG at least twice as large is decoded at 1/2, 1/4 or 1/8
            of its size, never below ``side`` pixels, at a fraction of the time.
    """
    file, path = media_file(path), media_name(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(file)
            width, height = image.size
            if width < 1 or height < 1:
                raise UserError("picture of 0 pixels", path)
            if width * height > MAX_PIXELS:
                raise UserError(
                    f"picture of {width}x{height} is too large", path, f"at most {MAX_PIXELS // 10**6} megapixels"
                )
            if side is not None:
                image.draft(None, (side, side))
            image.load()
            return image
    except FileNotFoundError:
        raise UserError("no such picture", path) from None
    except IsADirectoryError:
        raise UserError("a folder, not a picture", path) from None
    except Image.DecompressionBombError:
        raise UserError("picture is too large", path, f"at most {MAX_PIXELS // 10**6} megapixels") from None
    except UnidentifiedImageError:
        raise UserError("not a picture", path, "give a PNG, JPEG, WebP or GIF file") from None
    except (OSError, SyntaxError, ValueError) as e:
        raise UserError(f"broken picture ({str(e).splitlines()[0] if str(e) else type(e).__name__})", path) from None


def image_size(path: Medium) -> tuple[int, int]:
    """(width, height) of a picture from its header; errors as in ``load_image``."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(media_file(path)) as opened:
                return opened.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return open_image(path).size  # says what is wrong


def load_audio(path: Medium, sampling_rate: int = 16000) -> np.ndarray:
    """The sound as mono float32 [T] at ``sampling_rate``.

    Raises:
        UserError: missing, not a sound, truncated, empty, longer than an hour, or with values that are not numbers.
    """
    import soundfile

    file, path = media_file(path), media_name(path)
    if isinstance(file, Path) and not file.exists():
        raise UserError("no such sound file", path)
    try:
        with soundfile.SoundFile(file) as f:
            rate, expected = f.samplerate, f.frames
            if expected > MAX_SECONDS * rate:
                raise UserError(f"sound of {expected / rate:.0f} s is too long", path, f"at most {MAX_SECONDS:.0f} s")
            wave = f.read(dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, RuntimeError, OSError) as e:
        reason = str(e).split(": ")[-1].rstrip(".")
        raise UserError(f"not a sound, or broken ({reason})", path, "give a WAV, FLAC, OGG or MP3 file") from None
    if len(wave) == 0:
        raise UserError("empty sound", path)
    if len(wave) < expected:
        raise UserError(f"sound ends after {len(wave)} of {expected} samples", path, "the file is cut off")
    if not np.isfinite(wave).all():
        raise UserError("sound holds values that are not numbers", path)
    return resample(wave.mean(1), rate, sampling_rate)
