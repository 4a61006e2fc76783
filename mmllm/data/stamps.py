"""Reads the Tux Paint stamps: pictures with captions, drawing hints and real recordings of spoken names."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from mmllm.data.tiles import Art

_ARTICLE = re.compile(r"^(?:an?|the|some|one)\s+", re.IGNORECASE)
# Stems: twins ("cat_mirror") and numbered variants ("dog2", "rose-b") show the same thing.
_VARIANT = re.compile(r"(?:[-_ ]?mirror|[-_ ]?\d+[a-z]?|[-_ ][abc])$", re.IGNORECASE)


@dataclass
class Recording:
    """A person saying a stamp's name in English."""

    label: str
    key: str
    path: Path


def caption_label(caption: str, stem: str) -> str:
    """ "A Tamworth pig." -> "tamworth pig"; sentences and jokes give the file's stem instead."""
    text = caption.strip().rstrip(".! ").strip()
    text = _ARTICLE.sub("", re.sub(r"\s*\(.*?\)", "", text))
    words = text.split()
    sentence = len(words) > 4 or not words or re.search(r"[!?:,\"“”]", text)
    if sentence:
        text = re.sub(r"[-_]+", " ", plain_stem(stem))
    return " ".join(re.sub(r"[^A-Za-z' -]", " ", re.split(r"[–—]", text)[0]).lower().split())


def plain_stem(stem: str) -> str:
    """ "cat_mirror" -> "cat", "dog2" -> "dog"."""
    stem = stem.lower()
    while True:
        shorter = _VARIANT.sub("", stem)
        if shorter in ("", stem):
            return stem
        stem = shorter


def _caption(path: Path) -> str | None:
    """The English caption (first line) of a stamp, or None when it has no caption file."""
    text = path.with_suffix(".txt")
    if not text.is_file():
        return None
    lines = text.read_text(encoding="utf-8", errors="replace").splitlines()
    return lines[0] if lines else None


def read_stamps(folder: Path) -> list[Art]:
    """All stamps with a caption except ``symbols/``, sorted by path; PNG is preferred to SVG of the same stem."""
    chosen: dict[str, Path] = {}
    for path in sorted([*folder.rglob("*.png"), *folder.rglob("*.svg")], key=lambda p: (p.suffix != ".png", str(p))):
        key = path.relative_to(folder).with_suffix("").as_posix()
        if not key.startswith("symbols/"):
            chosen.setdefault(key, path)
    arts = []
    for key in sorted(chosen):
        path = chosen[key]
        caption = _caption(path)
        label = caption_label(caption, path.stem) if caption else ""
        if not label:
            continue
        hints = path.with_suffix(".dat")
        told = hints.read_text(encoding="utf-8", errors="replace") if hints.is_file() else ""
        parts = key.split("/")
        kind = "file" if path.suffix == ".png" else "svg_file"
        subgroup = " ".join(parts[1:2] if len(parts) > 2 else parts[:1])
        words = re.sub(r"[^a-z]+", " ", subgroup.lower()).strip()
        arts.append(Art("stamps", key, label, parts[0], words, kind, str(path), [], "nomirror" not in told))
    return arts


def read_recordings(folder: Path) -> list[Recording]:
    """The English spoken names of the animals (``STEM_desc.ogg``), sorted by path."""
    out = []
    for path in sorted((folder / "animals").rglob("*_desc.ogg")):
        stem = path.with_name(path.name.removesuffix("_desc.ogg") + ".txt")
        caption = _caption(stem)
        if caption:
            key = stem.relative_to(folder).with_suffix("").as_posix()
            label = caption_label(caption, stem.stem)
            out.append(Recording(label, key, path))
    return out
