"""Pieces of the builder's work as plain functions, so that several processes can share it without changing a byte."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmllm.collector import few_collections
from mmllm.data import speech
from mmllm.data import starter_sets as sets
from mmllm.data.scenes import Composer
from mmllm.data.tiles import Art, Tile, save_tiles, tile_loader

# Numbers that stand for the scene sets in a scene's seed; never renumber.
SCENE_SETS = {"train": 0, "val": 1, "val_new_vendor": 2, "eval_seen": 3, "eval_new_vendor": 4, "interleaved": 5}


def tile_job(job: tuple[list[Art], Path]) -> tuple[list[Tile], list[str]]:
    return save_tiles(*job)


@functools.cache
def load_photos(paths: tuple[Path, ...], shorter: int = 300) -> list[np.ndarray]:
    """Photographs for backgrounds, [h, w, 3] uint8, the shorter side ``shorter`` pixels; a process keeps them."""
    photos = []
    for path in paths:
        with Image.open(path) as opened:
            opened.draft("RGB", (shorter * 2, shorter * 2))
            image = opened.convert("RGB")
        scale = shorter / min(image.size)
        size = (max(shorter, round(image.width * scale)), max(shorter, round(image.height * scale)))
        photos.append(np.asarray(image.resize(size, Image.Resampling.BILINEAR)))
    return photos


def scene_job(job: dict[str, Any]) -> sets.Scenes:
    """Composes scenes ``start`` to ``stop`` of one set and saves them as JPEG."""
    folder, name = job["folder"], job["set"]
    photos = load_photos(tuple(job["photos"]))
    composer = Composer(job["pools"], job["blocks"], tile_loader(folder), job["config"], photos)
    made = []
    for i in range(job["start"], job["stop"]):
        scene = composer.scene(job["seed"], SCENE_SETS[name], i)
        path = f"scenes/{name}/{i:06d}.jpg"
        Image.fromarray(scene.image).save(folder / path, quality=95)
        made.append((path, scene.boxes(), [t.tile for t in scene.things]))
    return made


def speech_job(job: tuple[Path, list[tuple[int, str]], list[str], int, bool, int | None, list[str]]) -> sets.Clips:
    return speech.speak_names(*job)


class Workers:
    """Runs pieces of work in ``n`` processes, or here when n is 1; results come in the order of the work."""

    def __init__(self, n: int):
        self.n = n

    def map(self, function: Callable[[Any], Any], jobs: Sequence[Any], fresh: bool = False) -> Iterator[Any]:
        """``fresh``: every job gets a process of its own, whatever ``n`` is."""
        if not jobs or (self.n == 1 and not fresh):
            yield from map(function, jobs)
            return
        alone = 1 if fresh else None
        with ProcessPoolExecutor(self.n, get_context("spawn"), few_collections, max_tasks_per_child=alone) as pool:
            yield from pool.map(function, jobs)
