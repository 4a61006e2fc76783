"""Flickr30k captions (Young et al. 2014): the 1000 pictures of Karpathy's test split, five captions each."""

from __future__ import annotations

from mmllm.evaluate.benchmarks.captioning import PICTURE, CaptionBenchmark, fixed
from mmllm.evaluate.benchmarks.files import field, read_json
from mmllm.evaluate.tasks import Sample
from mmllm.registry import register


@register("benchmark", "flickr30k")
class Flickr30k(CaptionBenchmark):
    """One-sentence captions, judged by CIDEr-D."""

    name = "flickr30k"
    folders = ("Flickr30k", "flickr30k_entities", "flickr")
    layout = "dataset_flickr30k.json (Karpathy's split) and the pictures in flickr30k-images/"
    source = "shannon.cs.illinois.edu/DenotationGraph (pictures), cs.stanford.edu/people/karpathy/deepimagesent (split)"
    styles = {"official": fixed(PICTURE), "lmms": fixed(PICTURE), "llava": fixed(PICTURE)}

    def read(self) -> list[Sample]:
        path = self.need("dataset_flickr30k.json", "dataset*.json")
        out = []
        for row in field(read_json(path), "images", path):
            if row.get("split") == "test":
                name = str(field(row, "filename", path))
                media = self.any_of(f"flickr30k-images/{name}", f"images/{name}", name)
                out.append(Sample(name, name, [media], "", [s["raw"] for s in field(row, "sentences", path)]))
        return out
