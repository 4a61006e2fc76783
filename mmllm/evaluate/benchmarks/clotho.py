"""Clotho (Drossos et al. 2020, arXiv 1910.09387): captions of sounds, five per recording."""

from __future__ import annotations

from mmllm.evaluate.benchmarks.captioning import SOUND, CaptionBenchmark, fixed
from mmllm.evaluate.benchmarks.files import read_table
from mmllm.evaluate.tasks import Sample
from mmllm.registry import register


@register("benchmark", "clotho")
class Clotho(CaptionBenchmark):
    """The evaluation part, judged by CIDEr-D."""

    name = "clotho"
    folders = ("Clotho", "clotho_v2")
    layout = "clotho_captions_evaluation.csv {file_name, caption_1..5} and the recordings in evaluation/"
    source = "zenodo.org/records/4783391"
    kind = "audio"
    styles = {"official": fixed(SOUND), "lmms": fixed(SOUND)}

    def read(self) -> list[Sample]:
        path = self.need("clotho_captions_evaluation.csv", "clotho_captions_*.csv")
        part = path.stem.removeprefix("clotho_captions_")
        out = []
        for row in read_table(path, "file_name", "caption_1"):
            name = row["file_name"]
            media = self.any_of(f"{part}/{name}", f"clotho_audio_{part}/{name}", f"audio/{name}", name)
            captions = [row[f"caption_{k}"] for k in range(1, 6) if row.get(f"caption_{k}")]
            out.append(Sample(name, name, [media], "", captions, kind="audio"))
        return out
