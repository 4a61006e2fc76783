"""Concepts: which pictures show the same thing, which split it belongs to, and the scene vocabulary."""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from mmllm.data.stamps import plain_stem
from mmllm.errors import UserError

SPLITS = ("train", "val", "test")
# Words that do not change what a thing is; "black cat" and "cat" are one concept.
_QUALIFIERS = re.compile(
    r"\b(cartoon|happy|sad|red|yellow|green|blue|brown|white|black|pink|purple|orange|small|little|big|large|huge|face|fresh|"
    r"pair of|an?|the|some)\b"
)
_KEEP_WHOLE = {"orange", "pink"}  # a label that is nothing but a qualifier stays as it is


class Drawn(Protocol):
    """What the split needs of a picture; Art and Tile have it."""

    vendor: str
    key: str
    label: str
    category: str
    subgroup: str

    @property
    def id(self) -> str: ...


def noun(label: str) -> str:
    """ "a black cat" -> "cat", "cats" -> "cat": what two labels of the same thing have in common."""
    text = re.sub(r"[^a-z ]", "", label.lower().replace("-", " "))
    plain = " ".join(_QUALIFIERS.sub(" ", text).split()) if text not in _KEEP_WHOLE else text
    if plain.endswith("s") and not plain.endswith(("ss", "us", "is")) and len(plain) > 3:
        plain = plain[:-1]
    return plain or text.strip() or label


class UnionFind:
    """Disjoint sets over any hashable things."""

    def __init__(self) -> None:
        self.parent: dict[Hashable, Hashable] = {}

    def find(self, a: Hashable) -> Hashable:
        root = a
        while self.parent.setdefault(root, root) != root:
            root = self.parent[root]
        while self.parent[a] != root:
            self.parent[a], a = root, self.parent[a]
        return root

    def join(self, a: Hashable, b: Hashable) -> None:
        self.parent[self.find(a)] = self.find(b)


def concept_groups(drawn: Iterable[Drawn]) -> dict[str, str]:
    """Picture id -> name of its concept group (the smallest noun in it).

    Two pictures are in one group when they share a noun, or an emoji code point (all vendors), or a stamp's file stem
    up to its variant number, directly or through others.
    """
    sets = UnionFind()
    items = list(drawn)
    for x in items:
        sets.join(("id", x.id), ("noun", noun(x.label)))
        if x.vendor == "stamps":
            sets.join(("id", x.id), ("stem", plain_stem(x.key.rsplit("/", 1)[-1]).replace("_", " ").replace("-", " ")))
        else:
            sets.join(("id", x.id), ("code", x.key))
    members: dict[Hashable, list[Drawn]] = defaultdict(list)
    for x in items:
        members[sets.find(("id", x.id))].append(x)
    names = {root: min(noun(x.label) for x in xs) for root, xs in members.items()}
    return {x.id: names[root] for root, xs in members.items() for x in xs}


def split_of(group: str) -> str:
    """The split a group falls into by its name alone: 1 in 10 test, 1 in 10 val, the rest train."""
    tenth = int(hashlib.sha256(group.encode()).hexdigest(), 16) % 10
    return {0: "test", 1: "val"}.get(tenth, "train")


def checksum(splits: Mapping[str, str]) -> str:
    """sha256 of a split manifest's content, independent of order."""
    return hashlib.sha256(json.dumps(dict(sorted(splits.items())), separators=(",", ":")).encode()).hexdigest()


def concept_key(x: Drawn) -> str:
    """The name by which the frozen manifest knows a picture: the code point for every vendor's emoji, else its path."""
    return f"stamps/{x.key}" if x.vendor == "stamps" else x.key


def read_manifest(path: Path) -> dict[str, str]:
    """A frozen manifest: concept key -> split.

    Raises:
        UserError: its content does not match its own checksum.
    """
    data = json.loads(path.read_text(encoding="utf-8"))
    splits = {key: split for split in SPLITS for key in data[split]}
    if checksum(splits) != data["sha256"]:
        raise UserError("the split manifest does not match its checksum", path, "restore the file")
    return splits


def write_manifest(path: Path, splits: Mapping[str, str]) -> None:
    """Writes a manifest with its checksum; see ``read_manifest``."""
    data: dict[str, Any] = {"sha256": checksum(splits)}
    data |= {s: sorted(k for k, v in splits.items() if v == s) for s in SPLITS}
    path.write_text(json.dumps(data, indent=0, ensure_ascii=False) + "\n", encoding="utf-8")


def assign_splits(
    drawn: Sequence[Drawn], groups: Mapping[str, str], frozen: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Picture id -> split; a whole group always falls into one split.

    Groups take their names from what is there, so a missing source could move one; the frozen manifest prevents that: a
    group with a picture in it gets that picture's split (test before val before train if they differ).
    """
    known: dict[str, set[str]] = defaultdict(set)
    for x in drawn:
        if frozen and concept_key(x) in frozen:
            known[groups[x.id]].add(frozen[concept_key(x)])
    order = {"test": 0, "val": 1, "train": 2}
    decided = {g: min(v, key=order.__getitem__) for g, v in known.items()}
    return {x.id: decided.get(groups[x.id]) or split_of(groups[x.id]) for x in drawn}


@dataclass
class Concept:
    """One thing of the scene vocabulary.

    Attributes:
        block: coarse kind ("animals nature"), for related absent things and co-occurrence.
        seen, new: picture ids of the vendors that train, and of those held out.
    """

    label: str
    group: str
    block: str
    subgroup: str
    seen: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)


# Folders of the stamps, as the emoji's kinds; a stamp from elsewhere may join any kind.
_STAMP_BLOCKS = {
    "animals": "animals nature",
    "plants": "animals nature",
    "food": "food drink",
    "vehicles": "travel places",
}


def scene_vocabulary(
    drawn: Sequence[Drawn],
    groups: Mapping[str, str],
    splits: Mapping[str, str],
    wanted: Sequence[str],
    held_out: Sequence[str],
    size: int,
    min_drawings: int = 2,
    exclude_stamps: Sequence[str] = (),
) -> list[Concept]:
    """The first ``size`` of the ``wanted`` labels that can be used, in that order.

    A label can be used when its emoji belongs to a train concept, the training vendors have at least ``min_drawings``
    pictures of it and a held-out vendor has one. Stamps join by their last word ("tamworth pig" -> pig) when they are
    of a train concept and to the same kind, unless the whole label names another emoji ("hot dog").

    Args:
        exclude_stamps: stamps whose key contains one of these never join.
    """
    found: dict[str, Concept] = {}
    emoji_nouns = {noun(x.label) for x in drawn if x.vendor != "stamps"}
    for x in drawn:
        label = x.label.removesuffix(" face")
        if x.vendor == "stamps" or label not in wanted or splits[x.id] != "train":
            continue
        c = found.setdefault(label, Concept(label, groups[x.id], x.category, x.subgroup))
        (c.new if x.vendor in held_out else c.seen).append(x.id)
    for x in drawn:
        if x.vendor != "stamps" or splits[x.id] != "train" or any(part in x.key for part in exclude_stamps):
            continue
        c = found.get(x.label.split()[-1])
        if c is None or _STAMP_BLOCKS.get(x.category, c.block) != c.block:
            continue
        if noun(x.label) == noun(c.label) or noun(x.label) not in emoji_nouns:
            c.seen.append(x.id)
    usable = [
        label for label in wanted if label in found and len(found[label].seen) >= min_drawings and found[label].new
    ]
    return [found[label] for label in usable[:size]]
