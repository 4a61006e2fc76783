"""A data recipe that gives records their text in several made-up languages, of which some are worse than others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from mmllm.contracts import DataRecipe
from mmllm.data.captions import captions_of
from mmllm.errors import UserError
from mmllm.registry import register

LETTERS = "abcdefghijklmnopqrstuvwxyz"
FILLERS = ("thing", "stuff", "item", "object")


@register("data_recipe", "made_up_languages")
class MadeUpLanguages(DataRecipe):
    """The first text of each record in ``count`` languages: the first as it is, each other one with its own exchange of
    the letters. What a language says for a word depends on the word and the seed alone, not on the data.

    Args:
        count: of the languages, named ``l0``, ``l1``...
        poor: share of the words for which the last language has no more than one of four general ones; the languages
            between have the shares between 0 and this.
        seed: of the letters and the poor words; the same for training and test data.
    """

    def __init__(self, count: int = 6, poor: float = 0.0, seed: int = 0):
        where = "data recipe 'made_up_languages'"
        if count < 1:
            raise UserError(f"count must be at least 1 (got {count})", where)
        if not 0 <= poor <= 1:
            raise UserError(f"poor must be within 0..1 (got {poor})", where)
        self.count, self.poor, self.seed = count, poor, seed
        self.exchanges = [self._exchange(n) for n in range(count)]

    def apply(self, records: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for record in records:
            found = captions_of(record)
            if found:
                text = found[0][1]
                said = {f"l{n}": " ".join(self.word(n, w) for w in text.split()) for n in range(self.count)}
                yield {**record, "text": said, "label": record.get("label", text)}

    def word(self, language: int, word: str) -> str:
        """What a language says for a word."""
        rng = np.random.default_rng([self.seed, language, *word.encode()])
        share = self.poor * language / max(self.count - 1, 1)
        meant = FILLERS[int(rng.integers(len(FILLERS)))] if rng.random() < share else word
        return meant.translate(self.exchanges[language])

    def _exchange(self, language: int) -> dict[int, int]:
        order = np.random.default_rng([self.seed, language]).permutation(26) if language else range(26)
        new = "".join(LETTERS[i] for i in order)
        return str.maketrans(LETTERS + LETTERS.upper(), new + new.upper())
