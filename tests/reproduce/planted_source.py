"""A starter dataset in miniature: drawn cut-outs and the files that the planted data are made from."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image, ImageDraw

from mmllm.data.planted import PlantedConfig
from mmllm.reproduce.hallucination.data import DataPlan

NAMES = ["cat", "dog", "bus", "owl", "pear", "rose", "spoon"]
PLAN = DataPlan(labels=7, pairs=2, train=60, dev_regions=2, dev_twins=2, natural=4, twins=8, swapped=2,
                scene=PlantedConfig(size=48, noise=0))  # fmt: skip


def make_source(folder: Path) -> Path:
    """Writes the miniature and returns its folder."""
    vocabulary = []
    for i, name in enumerate(NAMES):
        ids = [f"v/{name}-{k}" for k in range(4)]
        for k, tile in enumerate(ids):
            image = Image.new("RGBA", (32, 32), (255, 255, 255, 0))
            ImageDraw.Draw(image).ellipse((1, 1, 30, 24 + k), fill=(35 * i, 250 - 30 * i, 60 * k, 255))
            path = folder / "tiles" / f"{tile}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
        # One drawing could not be rendered: it is listed and has no file.
        vocabulary.append({"label": name, "block": "b", "subgroup": "s", "seen": [*ids[:3], f"v/{name}-lost"],
                           "new": ids[3:]})  # fmt: skip
    (folder / "concepts.json").write_text(json.dumps({"vocabulary": vocabulary}))
    about = {"recipe_hash": "abc", "sources": [{"name": "drawn", "version": "1"}]}
    (folder / "dataset.json").write_text(json.dumps(about))
    return folder
