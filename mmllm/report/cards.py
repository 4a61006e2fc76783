"""A card for one answered item: its media with boxes, the prompt, the answer as it came and as it was read, truth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mmllm.report.html import data_uri, esc, picture_svg

MOST_BYTES = 1_000_000  # a longer recording is named, not put into the page
SOUNDS = {".wav": "audio/wav", ".ogg": "audio/ogg", ".flac": "audio/flac", ".mp3": "audio/mpeg"}


@dataclass
class Asked:
    """One item.

    Attributes:
        lines: (name, words, class or None) in their order; class is "right", "wrong" or None.
        boxes: as in ``mmllm.report.html.Item``, drawn on the first picture.
    """

    title: str
    media: Sequence[str]
    lines: list[tuple[str, str, str | None]] = field(default_factory=list)
    boxes: list[tuple[float, float, float, float, str, str]] = field(default_factory=list)


def card(item: Asked) -> str:
    """The item's HTML; a medium that is gone, broken or too long is named instead of shown."""
    shown = "".join(_medium(Path(m), item.boxes if i == 0 else ()) for i, m in enumerate(item.media))
    rows = []
    for name, words, style in item.lines:
        kind = f' class="{style}"' if style else ""
        rows.append(f"<dt>{esc(name)}</dt><dd{kind}>{esc(words) or '(nothing)'}</dd>")
    return f'<div class="card">{shown}<div class="small">{esc(item.title)}</div><dl>{"".join(rows)}</dl></div>'


def _medium(path: Path, boxes: Sequence[tuple[float, float, float, float, str, str]]) -> str:
    if not path.is_file():
        return _named(path, "file is gone")
    if path.suffix.lower() in SOUNDS:
        if path.stat().st_size > MOST_BYTES:
            return _named(path, "too long to stand here")
        return f'<audio controls preload="none" src="{data_uri(path, SOUNDS[path.suffix.lower()])}"></audio>'
    try:
        return picture_svg(path, boxes)
    except (OSError, ValueError, SyntaxError):
        return _named(path, "no picture")


def _named(path: Path, why: str) -> str:
    return f'<div class="small">{esc(why)}: {esc(path.name)}</div>'


def folded(heading: str, content: str, opened: bool = False) -> str:
    """A part of the page that a click opens; no script."""
    return f"<details{' open' if opened else ''}><summary>{esc(heading)}</summary>{content}</details>"
