"""CHAIR (Rohrbach et al. 2018, arXiv 1809.02156) on COCO: things that captions name and neither masks nor people do."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmllm.evaluate.benchmarks.base import Answered, Benchmark, Style
from mmllm.evaluate.benchmarks.captioning import fixed
from mmllm.evaluate.benchmarks.files import field, read_json
from mmllm.evaluate.chair import Vocabulary, score_caption, singular, words
from mmllm.evaluate.tasks import Row, Sample, pooled_figures
from mmllm.registry import register
from mmllm.report.figures import Figure

ASKS = "Please describe this image in detail."
PICTURES = 500
# Two-word names in which one word alone would mean another thing.
ANIMALS = "bird cat dog horse sheep cow elephant bear zebra giraffe animal cub".split()
VEHICLES = "jet train".split()
OTHER_THINGS = ("home plate", "train track")


def read_synonyms(path: Path) -> dict[str, list[str]]:
    """One line per category, ``person, girl, boy, ...``: its name first."""
    lines = [[w.strip() for w in x.split(",") if w.strip()] for x in path.read_text(encoding="utf-8").splitlines()]
    return {line[0]: line[1:] for line in lines if line}


def chair_vocabulary(synonyms: dict[str, list[str]]) -> Vocabulary:
    """The names with the authors' rules for pairs of words: a baby elephant is an elephant, a bow tie a tie."""
    owner = {w: name for name, others in synonyms.items() for w in (name, *others)}
    table = {name: list(others) for name, others in synonyms.items()}
    pairs = [(f"{age} {x}", x) for age in ("baby", "adult") for x in ANIMALS]
    pairs += [(f"passenger {x}", x) for x in VEHICLES] + [("bow tie", "tie"), ("toilet seat", "toilet")]
    for pair, word in pairs:
        if word in owner:
            table[owner[word]].append(pair)
    return Vocabulary(table, OTHER_THINGS)


def without_toilet_seats(text: str) -> str:
    """ "The seat of the toilet" names no chair: beside a toilet the word seat is dropped, as the authors do."""
    text = re.sub(r"\btoilet seats?\b", "toilet", text.lower())
    said = [singular(w) for w in words(text)]
    return re.sub(r"\bseats?\b", "", text) if "toilet" in said and "seat" in said else text


@register("benchmark", "chair")
class Chair(Benchmark):
    """500 pictures of val2014 drawn by the seed, or those of ``chair_images.txt`` (an id a line) if that is there.

    True contents are the masks and whatever the five people's captions name. Lemmas are plural rules instead of
    WordNet's. The length of captions decides much of the score: styles differ in it.
    """

    name = "chair"
    folders = ("CHAIR", "COCO", "coco")
    layout = "annotations/instances_val2014.json, annotations/captions_val2014.json, synonyms.txt and val2014/"
    source = "cocodataset.org (annotations, pictures) and github.com/LisaAnne/Hallucination (data/synonyms.txt)"
    parses = False
    styles: dict[str, Style] = {"official": fixed(ASKS, 512), "short": fixed(ASKS, 64), "lmms": fixed(ASKS, 2048)}

    def read(self) -> list[Sample]:
        self.vocabulary = chair_vocabulary(read_synonyms(self.need("synonyms.txt", "data/synonyms.txt")))
        there, images = defaultdict(set), {}
        self._masks(there, images)
        self._captions(there)
        return [self._sample(i, images[i], there[i]) for i in self._chosen(sorted(images))]

    def _masks(self, there: dict[Any, set[str]], images: dict[Any, str]) -> None:
        path = self.need("annotations/instances_val2014.json", "instances*.json")
        data = read_json(path)
        names = {c["id"]: self.vocabulary.canonical(c["name"]) for c in field(data, "categories", path)}
        images.update({i["id"]: i["file_name"] for i in field(data, "images", path)})
        for a in field(data, "annotations", path):
            name = names.get(a["category_id"])
            if name:
                there[a["image_id"]].add(name)

    def _captions(self, there: dict[Any, set[str]]) -> None:
        path = self.need("annotations/captions_val2014.json", "captions*.json")
        for a in field(read_json(path), "annotations", path):
            there[a["image_id"]].update(self._mentions(a["caption"]))

    def _mentions(self, text: str) -> list[str]:
        return self.vocabulary.mentions(without_toilet_seats(text))

    def _chosen(self, ids: list[Any]) -> list[Any]:
        listed = self.root / "chair_images.txt"
        if listed.is_file():
            wanted = set(listed.read_text(encoding="utf-8").split())
            return [i for i in ids if str(i) in wanted]
        if len(ids) <= PICTURES:
            return ids
        drawn = np.random.default_rng(self.seed).permutation(len(ids))[:PICTURES]
        return [ids[int(i)] for i in drawn]

    def _sample(self, number: Any, file: str, there: set[str]) -> Sample:
        media = self.any_of(f"val2014/{file}", f"images/{file}", file)
        return Sample(str(number), str(number), [media], "", sorted(there))

    def judge(self, row: Answered) -> None:
        score = score_caption(self._mentions(row.answer), row.sample.gold)
        row.hit = float(score.wrong == 0)
        row.counts = {"mentioned": score.mentioned, "wrong": score.wrong, "truth": score.truth,
                      "covered": score.covered, "words": len(words(row.answer))}  # fmt: skip

    def aggregate(self, rows: Sequence[Answered]) -> list[Figure]:
        def of(top: str, bottom: str) -> Any:
            return lambda r: (r.counts[top], r.counts[bottom])

        def some_wrong(r: Row) -> tuple[float, float]:
            return float(r.counts["wrong"] > 0), 1.0

        limit = f"at most {self.style.max_new_tokens} tokens"
        out = pooled_figures("chair_s", rows, better="lower", seed=self.seed, of=some_wrong, note=limit)
        out += pooled_figures("chair_i", rows, better="lower", seed=self.seed, of=of("wrong", "mentioned"), note=limit)
        out += pooled_figures("chair_recall", rows, seed=self.seed, of=of("covered", "truth"))
        real = [r for r in rows if not r.sample.control]
        length = sum(r.counts["words"] for r in real) / max(len(real), 1)
        return [*out, Figure("chair_words", length, n=len(real), unit="words")]
