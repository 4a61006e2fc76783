"""Measures of free captions: CHAIR with recall, how many inventions are planted partners, length and repetition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmllm.data.planted import Prior
from mmllm.evaluate.chair import Vocabulary, score_caption, words
from mmllm.evaluate.stats import ratio_interval
from mmllm.evaluate.tasks import Sample
from mmllm.reproduce.hallucination.measures import Interval

COUNTS = ("wrong", "mentioned", "any_wrong", "one", "covered", "truth", "partner", "tokens", "repeated", "trigrams")
# What each measure divides by what, and which way is better.
MEASURES = {
    "chair_i": ("wrong", "mentioned", "lower"),
    "chair_s": ("any_wrong", "one", "lower"),
    "recall": ("covered", "truth", "higher"),
    "partner_share": ("partner", "wrong", "lower"),
    "tokens": ("tokens", "one", "higher"),
    "repetition": ("repeated", "trigrams", "lower"),
}


@dataclass
class CaptionTable:
    """Counts of one condition's captions, [captions, COUNTS]; decoding and training seeds below one another."""

    counts: NDArray
    clusters: NDArray

    def column(self, name: str) -> NDArray:
        return self.counts[:, COUNTS.index(name)]

    def interval(self, measure: str, seed: int = 0) -> Interval:
        """The pooled ratio with its bootstrap interval over pictures."""
        top, bottom, _ = MEASURES[measure]
        return ratio_interval(self.column(top), self.column(bottom), self.clusters, seed)


def count_caption(text: str, tokens: int, truth: Sequence[str], prior: Prior, vocabulary: Vocabulary) -> list[float]:
    """The COUNTS of one caption."""
    mentions = vocabulary.listed(text)
    score = score_caption(mentions, truth)
    expected = {prior.partners[a] for a in truth if a in prior.partners}
    partner = sum(m in expected and m not in truth for m in mentions)
    spoken = words(text)
    trigrams = [tuple(spoken[i : i + 3]) for i in range(len(spoken) - 2)]
    return [score.wrong, score.mentioned, float(score.wrong > 0), 1.0, score.covered, score.truth, partner, tokens,
            len(trigrams) - len(set(trigrams)), len(trigrams)]  # fmt: skip


def tabulate(
    rows: Sequence[Mapping[str, Any]], samples: Sequence[Sample], prior: Prior, specs: Mapping[str, str]
) -> dict[str, CaptionTable]:
    """Condition -> its captions' counts.

    Args:
        rows: id, spec, text and tokens of each caption.
        specs: condition -> spec.
    """
    vocabulary, by_id = Vocabulary(prior.labels), {s.id: s for s in samples}
    out: dict[str, CaptionTable] = {}
    for name, spec in specs.items():
        own = [r for r in rows if r["spec"] == spec]
        counts = [count_caption(r["text"], r["tokens"], by_id[r["id"]].gold, prior, vocabulary) for r in own]
        clusters = np.array([by_id[r["id"]].cluster for r in own])
        out[name] = CaptionTable(np.array(counts, float).reshape(-1, len(COUNTS)), clusters)
    return out
