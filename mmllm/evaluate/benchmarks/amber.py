"""AMBER (Wang et al. 2023, arXiv 2311.07397): captions and yes/no questions about the same pictures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from mmllm.errors import UserError
from mmllm.evaluate.benchmarks import parsers
from mmllm.evaluate.benchmarks.base import YES_NO, Answered, Benchmark, Style
from mmllm.evaluate.benchmarks.files import field, read_json
from mmllm.evaluate.benchmarks.scores import by, ratio_sum_interval, slug, yes_no_figures
from mmllm.evaluate.chair import singular, words
from mmllm.evaluate.tasks import Row, Sample, pooled_figures
from mmllm.registry import register
from mmllm.report.figures import Figure

KINDS = {
    "discriminative-hallucination": "existence", "discriminative-attribute-state": "attribute",
    "discriminative-attribute-number": "attribute", "discriminative-attribute-action": "attribute",
    "relation": "relation", "discriminative-relation": "relation",
}  # fmt: skip
NOTE = "names by exact word; the authors also take words of similar meaning (spaCy), so CHAIR is higher here"


def _by_kind(rule: Any) -> Any:
    """Captions as they are, yes/no answers by the rule."""
    return lambda text, s: text if s.meta["split"] == "generative" else rule(text)


def _tokens(rule: Any) -> Style:
    return Style(lambda s: s.question, _by_kind(rule), 256, note=NOTE)


@register("benchmark", "amber")
class Amber(Benchmark):
    """Generative part: CHAIR, cover, hal, cog. Discriminative part: accuracy, and precision, recall, F1 of "no".

    The authors sum up both as (100 - CHAIR + F1) / 2; here as a fraction. With only one query file there, only its
    part is asked.
    """

    name = "amber"
    folders = ("AMBER",)
    layout = "data/{annotations.json,relation.json,safe_words.txt,query/query_all.json} and image/AMBER_ID.jpg"
    source = "github.com/junyangwang0410/AMBER"
    styles = {"official": _tokens(parsers.yes_no_capital), "lmms": _tokens(parsers.yes_no_contains)}

    def read(self) -> list[Sample]:
        path = self.need("data/annotations.json", "annotations.json")
        known = {int(field(r, "id", path)): r for r in read_json(path)}
        self.relation = read_json(self.need("data/relation.json", "relation.json"))
        safe = self.need("data/safe_words.txt", "safe_words.txt").read_text(encoding="utf-8")
        self.safe = {x.strip() for x in safe.splitlines() if x.strip()}
        self.vocabulary = {*self.relation, *(w for others in self.relation.values() for w in others)}
        queries = self.need("data/query/query_all.json", "query/query_all.json", "query_all.json",
                            "data/query/query_*.json", "query/query_*.json", "query_*.json")  # fmt: skip
        return [self._sample(q, known, queries) for q in read_json(queries)]

    def _sample(self, query: dict[str, Any], known: dict[int, dict[str, Any]], path: object) -> Sample:
        number, image = int(field(query, "id", path)), str(field(query, "image", path))
        if number not in known:
            raise UserError(f"no annotation of item {number}", path)
        truth = known[number]
        kind = str(truth["type"])
        media = self.any_of(*(f"{folder}{image}" for folder in ("image/", "images/", "data/image/", "")))
        question = str(field(query, "query", path))
        if kind == "generative":
            meta = {"split": kind, "hallu": truth["hallu"]}
            return Sample(str(number), image, [media], question, truth["truth"], meta=meta)
        meta = {"split": "discriminative", "kind": KINDS.get(kind, "relation"), "type": kind}
        return Sample(str(number), image, [media], question, str(truth["truth"]).lower(), YES_NO, meta=meta)

    def judge(self, row: Answered) -> None:
        if row.sample.meta["split"] != "generative":
            super().judge(row)
            return
        there, wrongly = self._named(row.sample.gold), self._named(row.sample.meta["hallu"])
        said = [w for w in map(singular, words(row.answer)) if w in self.vocabulary]
        wrong = [w for w in said if w not in self.safe and w not in there]
        counted = [w for w in said if w not in self.safe]
        row.counts = {
            "mentioned": len(said), "wrong": len(wrong),
            "truth": len(row.sample.gold), "covered": len({there[w] for w in counted if w in there}),
            "hallu": len(row.sample.meta["hallu"]), "cog": len({wrongly[w] for w in wrong if w in wrongly}),
        }  # fmt: skip
        row.hit = float(not wrong)

    def _named(self, things: Sequence[str]) -> dict[str, str]:
        """Word -> the annotated thing that it stands for."""
        out = {other: thing for thing in things for other in self.relation.get(thing, [])}
        return {**out, **{thing: thing for thing in things}}

    def aggregate(self, rows: Sequence[Answered]) -> list[Figure]:
        parts = by(rows, lambda r: r.sample.meta["split"])
        told, asked = parts.get("generative", []), parts.get("discriminative", [])
        out = self._captions(told) + (self._questions(asked) if asked else [])
        real = [[r for r in some if not r.sample.control] for some in (told, asked)]
        return [self._score(*real), *out] if all(real) else out

    def _captions(self, rows: Sequence[Answered]) -> list[Figure]:
        def ratio(name: str, top: str, bottom: str, better: str) -> list[Figure]:
            def of(r: Row) -> tuple[float, float]:
                return r.counts[top], r.counts[bottom]

            return pooled_figures(f"amber_{name}", rows, better=better, seed=self.seed, of=of)

        if not rows:
            return []
        hal = pooled_figures("amber_hal", rows, better="lower", seed=self.seed, of=lambda r: (1 - r.hit, 1.0))[:1]
        return [*ratio("chair", "wrong", "mentioned", "lower"), *ratio("cover", "covered", "truth", "higher")[:1], *hal,
                *ratio("cog", "cog", "hallu", "lower")[:1]]  # fmt: skip

    def _questions(self, rows: Sequence[Answered]) -> list[Figure]:
        out = yes_no_figures("amber", rows, self.seed, positive="no")
        for kind, some in by(rows, lambda r: r.sample.meta["kind"]).items():
            out += [f for f in yes_no_figures(f"amber_{slug(kind)}", some, self.seed, positive="no")
                    if re.search("(accuracy|f1)$", f.name)]  # fmt: skip
        return out

    def _score(self, told: Sequence[Answered], asked: Sequence[Answered]) -> Figure:
        """(1 - CHAIR + F1) / 2."""
        hits = [2.0 * (r.parsed == "no") * (r.sample.gold == "no") for r in asked]
        seen = [1.0 * (r.parsed == "no") + (r.sample.gold == "no") for r in asked]
        ones = [1.0] * len(told)
        named = [r.sample.cluster for r in told]
        parts = [(ones, ones, named, 0.5),
                 ([r.counts["wrong"] for r in told], [r.counts["mentioned"] for r in told], named, -0.5),
                 (hits, seen, [r.sample.cluster for r in asked], 0.5)]  # fmt: skip
        value, low, high = ratio_sum_interval(parts, self.seed)
        return Figure("amber_score", value, "higher", low, high, len(told) + len(asked), "fraction",
                      note="(1 - CHAIR + F1) / 2")  # fmt: skip
