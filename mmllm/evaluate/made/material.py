"""What benchmarks are made of: a dataset's held-out scenes with exact boxes, its cut-outs and its sounds."""

from __future__ import annotations

import json
import shutil
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np

from mmllm.data.questions import with_article
from mmllm.errors import UserError, unknown
from mmllm.evaluate.tasks import SPLITS, EvalData

POOLS = {"seen": "seen", "new_vendor": "new"}


@dataclass
class Scene:
    """One picture and what is on it.

    Attributes:
        number: from 1; also the number in its file name.
        file: name in the style of COCO's.
        path: where the picture is now.
        boxes: ``{"xyxy": [x0, y0, x1, y1] in 0..1, "text": label}``; no label twice.
    """

    number: int
    file: str
    path: Path
    boxes: list[dict[str, Any]]

    @property
    def labels(self) -> list[str]:
        return [b["text"] for b in self.boxes]

    @cached_property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        from PIL import Image

        with Image.open(self.path) as opened:
            return opened.size

    def ordered(self) -> list[dict[str, Any]]:
        """The boxes from left to right."""
        return sorted(self.boxes, key=lambda b: (centre(b)[0], b["xyxy"][1]))


def centre(box: dict[str, Any]) -> tuple[float, float]:
    """(x, y) of a box's middle in 0..1."""
    x0, y0, x1, y1 = box["xyxy"]
    return (x0 + x1) / 2, (y0 + y1) / 2


class Material:
    """The held-out part of a dataset that ``mmllm data build`` made.

    Args:
        root: the dataset's folder.
        split: ``seen`` (art of the training vendors) or ``new_vendor``.
        limit: most scenes, sounds and pairs.
        seed: decides every choice that is drawn.

    Raises:
        UserError: unknown split, or no dataset with such scenes.
    """

    def __init__(self, root: Path, split: str = "seen", limit: int | None = None, seed: int = 0):
        if split not in SPLITS:
            raise unknown("split", split, SPLITS, "--split")
        data = EvalData(root, limit, seed)
        if data.concepts is None:
            raise UserError("no concepts.json here", root, "build the dataset with mmllm data build")
        self.root, self.split, self.limit, self.seed = root, split, limit, seed
        self.manifest = data.manifest
        self.blocks: dict[str, str] = {v["label"]: v["block"] for v in data.concepts["vocabulary"]}
        self.labels = list(self.blocks)
        self.tiles = {v["label"]: v[POOLS[split]] for v in data.concepts["vocabulary"]}
        self.scenes = [self._scene(i, r) for i, r in enumerate(data.scenes(split), 1)]
        self.sounds = data.records("eval/hear.jsonl") if data.has("eval/hear.jsonl") else []

    @staticmethod
    def _scene(number: int, record: dict[str, Any]) -> Scene:
        path = Path(record["image"])
        boxes = list({b["text"]: b for b in record["boxes"]}.values())
        return Scene(number, f"COCO_val2014_{number:012d}{path.suffix}", path, boxes)

    def rng(self, *key: int) -> np.random.Generator:
        """A generator that depends on the seed and the key alone."""
        return np.random.default_rng((self.seed, *key))

    def absent(self, present: Sequence[str], count: int, rng: np.random.Generator) -> list[str]:
        """``count`` different labels that are not there, fewer when the vocabulary ends."""
        others = [x for x in self.labels if x not in present]
        return [others[i] for i in rng.permutation(len(others))[:count]]

    @cached_property
    def training(self) -> list[dict[str, Any]]:
        """Training scenes as records with ``boxes``, for their statistics; empty when the dataset has none."""
        path = self.root / "align" / "regions_train.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        return [json.loads(line) for line in lines]

    @cached_property
    def together(self) -> dict[str, Counter[str]]:
        """How often a thing stands beside another one in training (in these scenes when there are none)."""
        out: dict[str, Counter[str]] = defaultdict(Counter)
        for boxes in [r["boxes"] for r in self.training] or [s.boxes for s in self.scenes]:
            for a, b in permutations(dict.fromkeys(x["text"] for x in boxes), 2):
                out[a][b] += 1
        return out

    def partners(self, present: Sequence[str], count: int) -> list[str]:
        """The absent things that stand most often beside the present ones."""
        total: Counter[str] = Counter()
        for thing in present:
            total.update(self.together.get(thing, {}))
        order = sorted((x for x in self.labels if x not in present), key=lambda x: (-total[x], x))
        return [x for x in order[:count] if total[x]]

    def cutouts(self, label: str) -> list[Path]:
        """The rendered cut-outs of a thing."""
        paths = [self.root / "tiles" / f"{name}.png" for name in self.tiles[label]]
        return [p for p in paths if p.is_file()]


def copy(source: Path, target: Path) -> None:
    """Copies a picture or sound once."""
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)


def write_json(path: Path, data: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def listed(labels: Sequence[str]) -> str:
    """["cat", "dog", "owl"] -> "a cat, a dog and an owl"."""
    named = [with_article(x) for x in labels]
    return named[0] if len(named) == 1 else f"{', '.join(named[:-1])} and {named[-1]}"
