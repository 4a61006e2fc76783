"""Opens videos as evenly spaced frames: a list or folder of pictures, an animated picture, or a film through PyAV."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image, ImageSequence

from mmllm.data.blob import media_file, media_name
from mmllm.data.media import load_image
from mmllm.errors import UserError

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
ANIMATED = (b"GIF8", b"RIFF", b"\x89PNG")


def load_video(medium: Any, frames: int = 8, side: int | None = None) -> list[Image.Image]:
    """At most ``frames`` evenly spaced frames as PIL RGB; a shorter video gives all it has.

    Args:
        medium: a list of pictures in order, a folder of them (by name), an animated GIF, WebP or PNG, or a film, as
            path, bytes or blob.
        side: see ``mmllm.data.media.open_image``.

    Raises:
        UserError: missing, no frame in it, not a video, or a film without PyAV.
    """
    if isinstance(medium, list | tuple):
        return [load_image(p, side) for p in spaced(list(medium), frames, medium)]
    if isinstance(medium, str | Path) and Path(medium).is_dir():
        files = sorted(p for p in Path(medium).iterdir() if p.suffix.lower() in PICTURES)
        return [load_image(p, side) for p in spaced(files, frames, medium)]
    file, name = media_file(medium), media_name(medium)
    try:
        stream: Any = file.open("rb") if isinstance(file, Path) else file
    except OSError as e:
        raise UserError(f"cannot open this video ({e.strerror})", name) from None
    with stream:
        start = stream.read(4)
        stream.seek(0)
        return _animated(stream, name, frames) if start in ANIMATED else _film(stream, name, frames)


def spaced(items: list[Any], frames: int, where: Any = None) -> list[Any]:
    """The items in the middle of ``frames`` equal stretches; all of them where there are no more."""
    if not items:
        raise UserError("a video without frames", str(where))
    if len(items) <= frames:
        return items
    return [items[int((k + 0.5) * len(items) / frames)] for k in range(frames)]


def _animated(file: Any, name: Any, frames: int) -> list[Image.Image]:
    try:
        image = Image.open(file)
        wanted = set(spaced(list(range(getattr(image, "n_frames", 1))), frames, name))
        return [f.convert("RGB") for k, f in enumerate(ImageSequence.Iterator(image)) if k in wanted]
    except (OSError, SyntaxError, ValueError) as e:
        raise UserError(f"broken video ({e})", name) from None


def _film(file: Any, name: Any, frames: int) -> list[Image.Image]:
    try:
        import av  # pyright: ignore[reportMissingImports]
    except ImportError:
        do = "pip install av, or give the frames as a list or folder of pictures"
        raise UserError("a film needs PyAV to be decoded", name, do) from None
    try:
        with av.open(file) as container:
            seen = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
    except (av.FFmpegError, IndexError) as e:
        raise UserError(f"not a video ({e})", name) from None
    return [Image.fromarray(f) for f in spaced(seen, frames, name)]
