"""CHAIR and recall of captions whose true contents are known exactly: names found by longest match, no downloads."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmllm.data.questions import caption
from mmllm.evaluate.tasks import EvalTask, Row, Sample, pooled_figures
from mmllm.registry import register
from mmllm.report.figures import Figure

_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
_ARTICLES = {"a", "an", "the", "some", "one"}


def words(text: str) -> list[str]:
    """Lower-case words; a hyphen or apostrophe inside a word stays."""
    return _WORD.findall(text.lower().replace("’", "'"))


def singular(word: str) -> str:
    """A plain plural folded to its singular (cherries, boxes, dogs); words such as glass or bus stay."""
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if word.endswith("uses") and not word.endswith("ouses") and len(word) > 4:
        return word[:-2]
    if len(word) > 4 and word.endswith(("ches", "shes", "xes", "sses", "zzes")):
        return word[:-2]
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        return word[:-1]
    return word


def _key(phrase: Iterable[str]) -> tuple[str, ...]:
    parts = list(phrase)
    return (*parts[:-1], singular(parts[-1])) if parts else ()


def _bare(phrase: str) -> str:
    """A phrase in lower-case words without its leading articles."""
    parts = words(phrase)
    while parts and parts[0] in _ARTICLES:
        parts = parts[1:]
    return " ".join(parts)


class Vocabulary:
    """Names with their synonyms, found in running text by longest match; plurals fold to singulars.

    Args:
        names: canonical name -> further names for it; or just the names.
        ignore: phrases that contain a name and mean something else ("toilet seat" is no toilet).
    """

    def __init__(self, names: Mapping[str, Sequence[str]] | Iterable[str], ignore: Iterable[str] = ()):
        table = names if isinstance(names, Mapping) else {n: () for n in names}
        self._forms: dict[tuple[str, ...], str | None] = {_key(words(p)): None for p in ignore}
        # Synonyms first, so that a canonical name always means itself.
        for canonical, others in table.items():
            for other in others:
                self._forms[_key(words(other))] = canonical
        for canonical in table:
            self._forms[_key(words(canonical))] = canonical
        self._forms.pop((), None)
        self._longest = max((len(k) for k in self._forms), default=0)

    def __len__(self) -> int:
        """Different things that can be named."""
        return len({name for name in self._forms.values() if name})

    def canonical(self, phrase: str) -> str | None:
        """The canonical name that a phrase stands for as a whole, None when it is none."""
        return self._forms.get(_key(words(phrase)))

    def mentions(self, text: str) -> list[str]:
        """Canonical names in the order of the text, repeats included."""
        found, tokens, at = [], words(text), 0
        while at < len(tokens):
            for length in range(min(self._longest, len(tokens) - at), 0, -1):
                key = _key(tokens[at : at + length])
                if key in self._forms:
                    if (name := self._forms[key]) is not None:
                        found.append(name)
                    at += length
                    break
            else:
                at += 1
        return found

    def listed(self, text: str) -> list[str]:
        """The things of a caption that is a list ("a cat, a red dog and a bell."), also the ones nobody knows.

        A part that contains no known name stands as it is, so that an invented word counts as a thing that is not
        there instead of being overlooked.
        """
        out: list[str] = []
        for part in re.split(r"[,;.\n]", text):
            # A name may itself hold an "and" (fish and chips), so the whole part is tried before it is cut.
            pieces = [part] if self.canonical(_bare(part)) else re.split(r"\band\b", part)
            for piece in filter(None, map(_bare, pieces)):
                known = self.canonical(piece)
                out += [known] if known else self.mentions(piece) or [piece]
        return out


@dataclass
class CaptionScore:
    """Counts of one caption.

    Attributes:
        mentioned: mentions, repeats included; wrong: those of things that are not there.
        truth: different things in the scene; covered: those of them that the caption names.
    """

    mentioned: int
    wrong: int
    truth: int
    covered: int


def score_caption(mentions: Sequence[str], truth: Iterable[str]) -> CaptionScore:
    """CHAIR counts (Rohrbach et al. 2018, arXiv 1809.02156) of one caption against the exact contents."""
    there = set(truth)
    return CaptionScore(len(mentions), sum(m not in there for m in mentions), len(there), len(there & set(mentions)))


def chair(scores: Sequence[CaptionScore]) -> dict[str, float]:
    """``chair_i`` (wrong mentions / mentions), ``chair_s`` (captions with a wrong one), ``recall``; 0/0 is 0."""
    mentioned, truth = sum(s.mentioned for s in scores), sum(s.truth for s in scores)
    return {
        "chair_i": sum(s.wrong for s in scores) / mentioned if mentioned else 0.0,
        "chair_s": sum(s.wrong > 0 for s in scores) / len(scores) if scores else 0.0,
        "recall": sum(s.covered for s in scores) / truth if truth else 0.0,
    }


def vocabulary_from(concepts: Any, scenes: Iterable[dict[str, Any]]) -> Vocabulary:
    """The vocabulary of a dataset: the names (with synonyms) in its ``concepts.json`` and in its scenes."""
    table: dict[str, list[str]] = {box["text"]: [] for scene in scenes for box in scene["boxes"]}
    for entry in (concepts or {}).get("vocabulary", []):
        table.setdefault(entry["label"], []).extend(entry.get("synonyms", []))
    return Vocabulary(table)


@register("task", "caption")
class CaptionTask(EvalTask):
    """A free caption of each scene: recall of its things, and CHAIR."""

    max_new_tokens = 32
    limit = 300

    def samples(self) -> list[Sample]:
        scenes = self.data.scenes(self.split)
        self.vocabulary = vocabulary_from(self.data.concepts, scenes)
        return [
            Sample(str(s["id"]), str(s["id"]), [str(s["image"])], caption(s["boxes"]).question,
                   sorted({box["text"] for box in s["boxes"]}), meta={"caption": caption(s["boxes"]).answer})
            for s in scenes[: self.limit]
        ]  # fmt: skip

    def judge(self, row: Row) -> None:
        mentions = self.vocabulary.listed(row.answer)
        score = score_caption(mentions, row.sample.gold)
        row.hit, row.weight = score.covered, score.truth
        row.counts = {"mentioned": score.mentioned, "wrong": score.wrong, "different": len(set(mentions))}

    def aggregate(self, rows: Sequence[Row]) -> list[Figure]:
        seed = self.data.seed
        named = sum(r.counts["different"] for r in rows) / max(len(rows), 1)
        figures = pooled_figures(f"caption_recall_{self.split}", rows, named / max(len(self.vocabulary), 1), seed=seed,
                                 note="chance names as many things at random")  # fmt: skip
        figures += pooled_figures(f"chair_i_{self.split}", rows, better="lower", seed=seed,
                                  of=lambda r: (r.counts["wrong"], r.counts["mentioned"]))[:1]  # fmt: skip
        return figures + pooled_figures(f"chair_s_{self.split}", rows, better="lower", seed=seed,
                                        of=lambda r: (float(r.counts["wrong"] > 0), 1.0))[:1]  # fmt: skip
