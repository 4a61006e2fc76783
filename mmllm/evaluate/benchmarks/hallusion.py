"""HallusionBench (Guan et al. 2023, arXiv 2310.14566) by rules: per question, per figure and per question pair."""

from __future__ import annotations

from collections.abc import Sequence

from mmllm.evaluate.benchmarks import parsers
from mmllm.evaluate.benchmarks.base import SHORT, YES_NO, Answered, Benchmark, Style
from mmllm.evaluate.benchmarks.files import field, read_json
from mmllm.evaluate.benchmarks.scores import accuracy_figures, grouped, yes_no_figures
from mmllm.evaluate.tasks import Sample, pooled_figures
from mmllm.registry import register
from mmllm.report.figures import Figure

KEYS = ("category", "subcategory", "set_id", "figure_id", "question_id")
UNSURE = "by rules instead of GPT-4; neither yes nor no is right where a figure would be needed and is not shown"


@register("benchmark", "hallusion")
class HallusionBench(Benchmark):
    """Questions of the kind VS exist with and without their figure; figure 0 of VS is none at all."""

    name = "hallusion"
    folders = ("HallusionBench",)
    layout = "HallusionBench.json and the pictures under its field filename (hallusion_bench/VD/..., VS/...)"
    source = "github.com/tianyi-lab/HallusionBench"
    styles = {
        "official": Style(lambda s: s.question, lambda text, s: parsers.yes_no_word(text), 64, note=UNSURE),
        "llava": Style(lambda s: s.question + SHORT, lambda text, s: parsers.yes_no_word(text), 16, note=UNSURE),
        "vlmevalkit": Style(lambda s: s.question,
                            lambda text, s: parsers.yes_no_word(text), 64),
    }  # fmt: skip
    closed = True

    def read(self) -> list[Sample]:
        path = self.need("HallusionBench.json", "*allusion*ench*.json")
        out = []
        for row in read_json(path):
            names = [str(field(row, key, path)) for key in KEYS]
            category, _, _, figure_id, question_id = names
            shown = str(field(row, "visual_input", path)) != "0"
            file = str(row.get("filename") or "").removeprefix("./")
            media = [self.any_of(file, f"hallusion_bench/{file}", f"images/{file}")] if shown and file else []
            figure = "_".join(names[:4]) if category == "VD" or figure_id != "0" else None
            meta = {"category": category, "figure": figure,
                    "pair": "_".join([*names[:3], question_id]), "shown": bool(media), "hard": figure_id != "0",
                    "unsure_is_right": category == "VS" and figure_id == "0"}  # fmt: skip
            gold = YES_NO[1 - int(field(row, "gt_answer", path))]
            question = str(field(row, "question", path))
            out.append(Sample("_".join(names), "_".join(names[:3]), media, question, gold, YES_NO, meta=meta))
        return out

    def judge(self, row: Answered) -> None:
        super().judge(row)
        if row.parsed is None and row.sample.meta["unsure_is_right"] and self.style_name != "vlmevalkit":
            row.hit = 1.0

    def aggregate(self, rows: Sequence[Answered]) -> list[Figure]:
        seed = self.seed
        out = accuracy_figures("hallusion", rows, seed, "category", note="aAcc: over all questions")
        figures = grouped(rows, lambda r: r.sample.meta["figure"])
        pairs = grouped(rows, lambda r: r.sample.meta["pair"])
        out += pooled_figures("hallusion_figure_accuracy", figures, seed=seed, note="fAcc: all on a figure right")
        out += pooled_figures("hallusion_pair_accuracy", pairs, seed=seed, note="qAcc: right on all its figures")
        for name, hard in (("easy", False), ("hard", True)):
            some = [r for r in rows if r.sample.meta["hard"] == hard]
            out += pooled_figures(f"hallusion_accuracy_{name}", some, 0.5, seed=seed)[:1] if some else []
        told = ("hallusion_yes_ratio", "hallusion_auc")
        return out + [f for f in yes_no_figures("hallusion", rows, seed) if f.name in told]
