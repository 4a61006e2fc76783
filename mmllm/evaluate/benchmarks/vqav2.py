"""VQAv2 (Goyal et al. 2017, arXiv 1612.00837): open questions on COCO pictures, ten people's answers each."""

from __future__ import annotations

from collections.abc import Sequence

from mmllm.evaluate.benchmarks.base import SHORT, Answered, Benchmark, Style
from mmllm.evaluate.benchmarks.files import field, read_json
from mmllm.evaluate.benchmarks.scores import by, slug
from mmllm.evaluate.benchmarks.vqa_score import evalai_answer, evalai_score, official_answer, official_score
from mmllm.evaluate.tasks import Sample, pooled_figures
from mmllm.registry import register
from mmllm.report.figures import Figure


@register("benchmark", "vqav2")
class VqaV2(Benchmark):
    """The validation part, whose answers are public."""

    name = "vqav2"
    folders = ("VQAv2", "VQA")
    layout = "v2_OpenEnded_mscoco_val2014_questions.json, v2_mscoco_val2014_annotations.json, val2014/*.jpg"
    source = "visualqa.org/download.html"
    parses = False
    styles = {
        "official": Style(lambda s: s.question + SHORT, lambda text, s: official_answer(text, s.gold)),
        "llava": Style(lambda s: s.question + SHORT, lambda text, s: evalai_answer(text)),
        "lmms": Style(lambda s: s.question + SHORT, lambda text, s: evalai_answer(text)),
    }

    def read(self) -> list[Sample]:
        asked = self.need("v2_OpenEnded_mscoco_val2014_questions.json", "*uestions*.json")
        answered = self.need("v2_mscoco_val2014_annotations.json", "*annotations*.json")
        truth = {r["question_id"]: r for r in field(read_json(answered), "annotations", answered)}
        out = []
        for row in field(read_json(asked), "questions", asked):
            number, picture = field(row, "question_id", asked), int(field(row, "image_id", asked))
            known = field(truth, number, answered)
            file = f"COCO_val2014_{picture:012d}.jpg"
            media = self.any_of(f"val2014/{file}", f"images/{file}", file)
            out.append(Sample(str(number), str(picture), [media], str(field(row, "question", asked)),
                              [a["answer"] for a in known["answers"]],
                              meta={"answer_type": known.get("answer_type", "")}))  # fmt: skip
        return out

    def judge(self, row: Answered) -> None:
        score = official_score if self.style_name == "official" else evalai_score
        row.hit = score(row.answer, row.sample.gold)

    def aggregate(self, rows: Sequence[Answered]) -> list[Figure]:
        out = pooled_figures("vqav2_accuracy", rows, seed=self.seed, note="soft accuracy against ten answers")
        for kind, some in by(rows, lambda r: r.sample.meta["answer_type"]).items():
            out += pooled_figures(f"vqav2_accuracy_{slug(kind)}", some, seed=self.seed)[:1]
        return out
