"""What a starter recipe says besides its sources: vendors, vocabulary, scenes, voices and sizes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from mmllm.config import StrictModel, parse_config
from mmllm.data.scenes import SceneConfig
from mmllm.errors import unknown

BUILD_VERSION = 10  # raise it when the code writes other files for the same recipe


class Vendors(StrictModel):
    """Whose art trains, and whose is kept entirely for testing."""

    train: list[str]
    held_out: list[str]


class Voices(StrictModel):
    """Voices that train, and those kept for testing.

    Each name is trained in ``per_name`` of the first and in all of ``every``, Pico's left out where Pico is missing.
    """

    train: list[str]
    held_out: list[str]
    per_name: int | None = None
    every: list[str] = []


class Size(StrictModel):
    """How much of everything one size has; None means all there is. ``balanced``: as many "no" as "yes" in training."""

    concepts: int
    align_pictures: int | None = None
    train_scenes: int
    val_scenes: int
    eval_scenes: int
    interleaved_train: int
    interleaved_eval: int
    spoken_names: int | None = None
    held_out_names: int
    hear_names: int
    balanced: bool = False


class Recipe(StrictModel):
    """A starter recipe; ``sources`` is checked by ``mmllm.data.sources``."""

    name: str
    seed: int = 0
    sources: dict[str, Any]
    splits: str | None = None  # frozen manifest beside the recipe
    vendors: Vendors
    pip_only: Vendors  # when no npm vendor could be had
    vocabulary: list[str]
    exclude_stamps: list[str] = []
    scene: SceneConfig = SceneConfig()
    train_beta: float = 0.0
    voices: Voices
    sizes: dict[str, Size]

    def size(self, name: str) -> Size:
        """One of ``sizes``.

        Raises:
            UserError: no such size.
        """
        if name not in self.sizes:
            raise unknown("size", name, self.sizes, "data recipe")
        return self.sizes[name]


def parse_recipe(data: dict[str, Any], source: object = "data recipe") -> Recipe:
    """Checks a recipe; raises UserError naming the key."""
    return parse_config(data, Recipe, source)


def recipe_hash(recipe: Recipe, size: str, used: list[dict[str, str]], manifest: Path | None) -> str:
    """sha256 of everything that decides a dataset's content: recipe, size, the sources really used, code version."""
    content = {
        "recipe": recipe.model_dump(mode="json", exclude={"sources", "sizes", "splits"}),
        "size": recipe.size(size).model_dump(mode="json"),
        "sources": sorted((u["name"], u["version"], u["sha256"]) for u in used),
        "manifest": hashlib.sha256(manifest.read_bytes()).hexdigest() if manifest else None,
        "version": BUILD_VERSION,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
