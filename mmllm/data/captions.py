"""An item's captions, in one or several languages, and the choice among them as a pure function of seed and step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from mmllm.errors import UserError, unknown

Choice = Literal["random", "first", "round_robin", "all"]
Caption = tuple[str | None, str]  # language, text


def captions_of(record: dict[str, Any], languages: Sequence[str] | None = None) -> list[Caption]:
    """(language, text) of everything in a record's ``text``: a text, a list, or language -> text or list.

    The label stands in where there is no text.

    Args:
        languages: keep only these (texts without a language stay); None keeps all.
    """
    text = record.get("text", record.get("label"))
    by_language = text if isinstance(text, dict) else {None: text}
    found: list[Caption] = []
    for language, texts in by_language.items():
        if languages is None or language is None or language in languages:
            found += [(language, t) for t in (texts if isinstance(texts, list) else [texts]) if t is not None]
    return found


def label_of(record: dict[str, Any]) -> str:
    """A record's label, or its first text."""
    return str(record.get("label") or next((t for _, t in captions_of(record)), ""))


@dataclass
class CaptionSampler:
    """Which caption of each item of a batch is used.

    Attributes:
        how: ``random`` draws one; ``first`` takes the first; ``round_robin`` goes through an item's captions pass by
            pass over the data, items with a different start; ``all`` takes every one, a number that many at random (all
            where an item has no more).
        items: number of items in the data, the length of a pass.
    """

    how: Choice | int = "random"
    items: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.how, int) and self.how < 1:
            raise UserError(f"captions must be at least 1 (got {self.how})")
        if not isinstance(self.how, int) and self.how not in get_args(Choice):
            raise unknown("choice of captions", self.how, get_args(Choice))

    def pick(
        self, captions: Sequence[Sequence[Any]], chosen: Sequence[int], passes: int, rng: np.random.Generator
    ) -> tuple[list[Any], list[int]]:
        """The captions of a batch, and for each the place in ``chosen`` of the item that it belongs to.

        Args:
            captions: of every item of the data; none may be empty.
            chosen: item numbers of the batch.
            passes: how often the data have been gone through before this batch.
            rng: made from the seed and the step.
        """
        picked, owner = [], []
        for place, item in enumerate(chosen):
            held = captions[item]
            if self.how == "all" or (isinstance(self.how, int) and self.how >= len(held)):
                which = range(len(held))
            elif isinstance(self.how, int):
                which = rng.choice(len(held), self.how, replace=False).tolist()
            elif self.how == "random":
                which = [int(rng.integers(len(held)))]
            else:
                which = [0 if self.how == "first" else (passes + item) % len(held)]
            picked += [held[w] for w in which]
            owner += [place] * len(which)
        return picked, owner
