"""AudioCaps (Kim et al. 2019): captions of ten-second sounds from videos, five per sound in the test part."""

from __future__ import annotations

from mmllm.evaluate.benchmarks.captioning import SOUND, CaptionBenchmark, fixed
from mmllm.evaluate.benchmarks.files import read_table
from mmllm.evaluate.tasks import Sample
from mmllm.registry import register


@register("benchmark", "audiocaps")
class AudioCaps(CaptionBenchmark):
    """The test part, judged by CIDEr-D. Sounds whose video is gone are left out; results.json says how many."""

    name = "audiocaps"
    folders = ("AudioCaps",)
    layout = "test.csv {youtube_id, start_time, caption} and the sounds YOUTUBEID[_START].wav in test/ or audio/"
    source = "github.com/cdjkim/audiocaps (captions; the sounds are cut from the videos)"
    kind = "audio"
    may_lack_media = True
    styles = {"official": fixed(SOUND), "lmms": fixed(SOUND)}

    def read(self) -> list[Sample]:
        path = self.need("test.csv", "dataset/test.csv", "audiocaps_test.csv")
        captions: dict[tuple[str, str], list[str]] = {}
        for row in read_table(path, "youtube_id", "start_time", "caption"):
            captions.setdefault((row["youtube_id"], row["start_time"]), []).append(row["caption"])
        return [self._sample(video, start, said) for (video, start), said in captions.items()]

    def _sample(self, video: str, start: str, captions: list[str]) -> Sample:
        names = (f"{video}_{start}", video, f"Y{video}", f"Y{video}_{start}")
        media = self.any_of(*(f"{folder}{name}{end}" for folder in ("test/", "audio/", "") for name in names
                              for end in (".wav", ".flac")))  # fmt: skip
        return Sample(f"{video}_{start}", video, [media], "", captions, kind="audio")
