"""The benchmarks of the field, read from the files that users have; each a module imported when asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from mmllm.registry import get, names

if TYPE_CHECKING:
    from mmllm.evaluate.benchmarks.base import Benchmark

# name -> module of this package.
OWN = {
    "pope": "pope", "pope_aokvqa": "pope", "pope_gqa": "pope", "popev2": "pope",
    "chair": "chair_coco", "mme": "mme", "mmbench": "mmbench", "seed": "seed",
    "scienceqa": "scienceqa", "mmvp": "mmvp", "amber": "amber", "hallusion": "hallusion", "textvqa": "textvqa",
    "vqav2": "vqav2", "gqa": "gqa", "refcoco": "refcoco", "refcoco+": "refcoco", "refcocog": "refcoco",
    "flickr30k": "flickr30k", "coco_captions": "coco_captions", "esc50": "esc50", "clotho": "clotho",
    "audiocaps": "audiocaps", "mmau": "mmau", "imagefolder": "imagefolder",
}  # fmt: skip


def benchmark_names() -> list[str]:
    """All benchmarks, plugins' included (registered as ("benchmark", name)), without importing ours."""
    return sorted({*OWN, *names("benchmark")})


def get_benchmark(name: str) -> type[Benchmark]:
    """The class of a benchmark.

    Raises:
        UserError: unknown name.
    """
    if name in OWN:
        importlib.import_module(f"mmllm.evaluate.benchmarks.{OWN[name]}")
    return get("benchmark", name, "--tasks")
