"""TextVQA (Singh et al. 2019, arXiv 1904.08920): questions on the writing in pictures, ten people's answers each."""

from __future__ import annotations

from collections.abc import Sequence

from mmllm.evaluate.benchmarks.base import SHORT, Answered, Benchmark, Style
from mmllm.evaluate.benchmarks.files import field, read_json
from mmllm.evaluate.benchmarks.vqa_score import evalai_answer, evalai_score
from mmllm.evaluate.tasks import Sample, pooled_figures
from mmllm.registry import register
from mmllm.report.figures import Figure


def with_ocr(sample: Sample) -> str:
    """LLaVA's prompt with the words that a reader found in the picture."""
    return f"{sample.question}\nReference OCR token: {', '.join(sample.meta['ocr'])}{SHORT}"


@register("benchmark", "textvqa")
class TextVqa(Benchmark):
    """The validation part. LLaVA shows the model what an OCR system read; lmms-eval does not, and lower-cases the
    question after its first letter."""

    name = "textvqa"
    folders = ("TextVQA",)
    layout = "TextVQA_0.5.1_val.json (in style llava also TextVQA_Rosetta_OCR_v0.2_val.json), train_images/ID.jpg"
    source = "textvqa.org/dataset"
    parses = False
    styles = {
        "official": Style(lambda s: s.question + SHORT, lambda text, s: evalai_answer(text)),
        "llava": Style(with_ocr, lambda text, s: evalai_answer(text), note="with the words of an OCR system"),
        "lmms": Style(lambda s: s.question.capitalize() + SHORT, lambda text, s: evalai_answer(text)),
    }

    def read(self) -> list[Sample]:
        path = self.need("TextVQA_0.5.1_val.json", "*TextVQA*val*.json")
        ocr = self._ocr() if self.style_name == "llava" else {}
        out = []
        for row in field(read_json(path), "data", path):
            picture = str(field(row, "image_id", path))
            words = row.get("ocr_tokens", ocr.get(picture))
            if words is None and self.style_name == "llava":
                raise self.lacks("TextVQA_Rosetta_OCR_v0.2_val.json")
            media = self.any_of(f"train_images/{picture}.jpg", f"train_val_images/train_images/{picture}.jpg",
                                f"images/{picture}.jpg")  # fmt: skip
            out.append(Sample(str(field(row, "question_id", path)), picture, [media], str(field(row, "question", path)),
                              list(field(row, "answers", path)), meta={"ocr": words or []}))  # fmt: skip
        return out

    def _ocr(self) -> dict[str, list[str]]:
        found = sorted(self.root.glob("*Rosetta_OCR*val*.json"))
        return {str(r["image_id"]): r["ocr_tokens"] for r in read_json(found[0])["data"]} if found else {}

    def judge(self, row: Answered) -> None:
        row.hit = evalai_score(row.answer, row.sample.gold)

    def aggregate(self, rows: Sequence[Answered]) -> list[Figure]:
        return pooled_figures("textvqa_accuracy", rows, seed=self.seed, note="soft accuracy against ten answers")
