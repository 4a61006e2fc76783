"""Reads emoji art of several vendors (iconify packages or plain SVG folders) and its English names."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from mmllm.data.tiles import Art
from mmllm.errors import UserError

# Groups that hold things one can point at; faces, flags, hands, signs and clocks are left out.
GROUPS = ("smileys-emotion", "animals-nature", "food-drink", "travel-places", "activities", "objects")
JUNK_SUBGROUPS = {"time", "alphanum", "keycap", "zodiac", "geometric", "arrow", "av-symbol", "hotel"}
# Emoji whose drawing carries writing or a side, so a mirrored copy would be wrong.
_NO_FLIP = re.compile(
    r"\b(book|newspaper|page|scroll|calendar|clock|abacus|keyboard|left|right|map|globe|music|label)\b"
)


def plain_hex(code: str) -> str:
    """ "1f441-FE0F-200D" -> "1F441-200D": upper case, without the variation selector that vendors put or leave out."""
    return "-".join(p for p in code.upper().replace("_", "-").split("-") if p != "FE0F")


def clean_label(name: str) -> str:
    """ "T-Rex" -> "t-rex", "cat face" -> "cat face"; quotes and colons go."""
    return " ".join(re.sub(r"[“”\"’‘:!.]", "", name.lower().replace("_", " ")).split())


def load_names(emojibase: Path | None, emoji_data: Path | None) -> dict[str, dict[str, Any]]:
    """Names and kinds by plain hexcode: ``{"label", "category", "subgroup", "keywords"}``.

    Args:
        emojibase: folder with ``en/data.json`` and ``meta/groups.json`` (better labels), or None.
        emoji_data: folder with ``emoji.json``, the fallback.

    Raises:
        UserError: neither is there.
    """
    out: dict[str, dict[str, Any]] = {}
    if emojibase is not None:
        groups = json.loads((emojibase / "meta/groups.json").read_text(encoding="utf-8"))
        for x in json.loads((emojibase / "en/data.json").read_text(encoding="utf-8")):
            if "group" not in x or "subgroup" not in x:
                continue
            out[plain_hex(x["hexcode"])] = {
                "label": clean_label(x["label"]),
                "category": groups["groups"][str(x["group"])],
                "subgroup": groups["subgroups"][str(x["subgroup"])],
                "keywords": x.get("tags", []),
            }
    elif emoji_data is not None:
        for x in json.loads((emoji_data / "emoji.json").read_text(encoding="utf-8")):
            out[plain_hex(x["unified"])] = {
                "label": clean_label(x["name"] or x["short_name"]),
                "category": re.sub(r"[^a-z]+", "-", x["category"].lower()),
                "subgroup": x["subcategory"].lower(),
                "keywords": [s.replace("_", " ") for s in x["short_names"]],
            }
    else:
        raise UserError("no emoji names: neither emojibase nor emoji-data is there", do="run mmllm doctor")
    return {k: v for k, v in out.items() if v["category"] in GROUPS and v["subgroup"] not in JUNK_SUBGROUPS}


def subgroup_words(subgroup: str) -> str:
    """ "animal-mammal" -> "animal mammal", "transport-ground" -> "ground transport"."""
    head, _, tail = subgroup.partition("-")
    if head in ("transport", "place") and tail:
        return f"{tail.replace('-', ' ')} {head}"
    return subgroup.replace("-", " ")


def _iconify_svg(pack: dict[str, Any], name: str) -> str | None:
    """The SVG text of one icon of an iconify ``icons.json``; follows one alias."""
    icon = pack["icons"].get(name) or pack["icons"].get(pack.get("aliases", {}).get(name, {}).get("parent"))
    if icon is None:
        return None
    width, height = icon.get("width", pack.get("width", 16)), icon.get("height", pack.get("height", 16))
    view = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {spaces} viewBox="{view}">{icon["body"]}</svg>'


def _slug(label: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-")


def read_vendor(vendor: str, folder: Path, names: dict[str, dict[str, Any]]) -> list[Art]:
    """All named things of one vendor, sorted by code point.

    ``folder`` is an iconify package (``icons.json``, with ``chars.json`` where it exists, else matched by name) or a
    folder with SVG files named by code point, directly or in ``svg/``.

    Raises:
        UserError: the folder holds neither.
    """
    found: dict[str, tuple[str, str]] = {}  # plain hexcode -> (kind, data)
    if (folder / "icons.json").is_file():
        pack = json.loads((folder / "icons.json").read_text(encoding="utf-8"))
        icons: dict[str, str] = {}
        if (folder / "chars.json").is_file():
            for code, name in json.loads((folder / "chars.json").read_text(encoding="utf-8")).items():
                icons.setdefault(plain_hex(code), name)
        slugs = {_slug(v["label"]): code for code, v in names.items()}
        for name in pack["icons"]:
            if name in slugs:
                icons.setdefault(slugs[name], name)
        for code, name in icons.items():
            if code in names and (svg := _iconify_svg(pack, name)):
                found[code] = ("svg", svg)
    else:
        for path in sorted([*folder.glob("*.svg"), *folder.glob("svg/*.svg")]):
            found.setdefault(plain_hex(path.stem), ("svg_file", str(path)))
        if not found:
            raise UserError(f"no emoji art of '{vendor}'", folder, "remove the folder and build again")
    arts = []
    for code in sorted(set(found) & set(names)):
        about, (kind, data) = names[code], found[code]
        flip = not _NO_FLIP.search(about["label"])
        words = subgroup_words(about["subgroup"])
        category = about["category"].replace("-", " ")
        arts.append(Art(vendor, code, about["label"], category, words, kind, data, about["keywords"], flip))
    return arts
