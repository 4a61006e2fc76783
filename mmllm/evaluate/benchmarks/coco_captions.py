"""COCO captions (Chen et al. 2015, arXiv 1504.00325): Karpathy's test split, or one of COCO's own caption files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmllm.evaluate.benchmarks.captioning import PICTURE, CaptionBenchmark, fixed
from mmllm.evaluate.benchmarks.files import field, read_json
from mmllm.evaluate.tasks import Sample
from mmllm.registry import register


@register("benchmark", "coco_captions")
class CocoCaptions(CaptionBenchmark):
    """One-sentence captions, judged by CIDEr-D. Karpathy's file goes before COCO's when both are there."""

    name = "coco_captions"
    folders = ("COCO", "coco")
    layout = "dataset_coco.json (Karpathy's split) or annotations/captions_val20*.json, and val2014/ or val2017/"
    source = "cocodataset.org, cs.stanford.edu/people/karpathy/deepimagesent (split)"
    styles = {"official": fixed(PICTURE), "lmms": fixed(PICTURE), "llava": fixed(PICTURE)}

    def read(self) -> list[Sample]:
        path = self.need("dataset_coco.json", "annotations/captions_val*.json", "captions_val*.json")
        data = read_json(path)
        return self._coco(data, path) if "annotations" in data else self._karpathy(data, path)

    def _karpathy(self, data: dict[str, Any], path: Path) -> list[Sample]:
        rows = [r for r in field(data, "images", path) if r.get("split") == "test"]
        return [self._sample(str(r.get("cocoid", r["filename"])), r.get("filepath", "val2014"), r["filename"],
                             [s["raw"] for s in r["sentences"]]) for r in rows]  # fmt: skip

    def _coco(self, data: dict[str, Any], path: Path) -> list[Sample]:
        captions: dict[Any, list[str]] = {}
        for row in data["annotations"]:
            captions.setdefault(field(row, "image_id", path), []).append(str(field(row, "caption", path)))
        folder = path.stem.removeprefix("captions_")
        return [self._sample(str(r["id"]), folder, r["file_name"], captions[r["id"]])
                for r in field(data, "images", path) if r["id"] in captions]  # fmt: skip

    def _sample(self, number: str, folder: str, name: str, captions: list[str]) -> Sample:
        return Sample(number, number, [self.any_of(f"{folder}/{name}", f"images/{name}", name)], "", captions)
