"""Scaling Up Visual and Vision-Language Representation Learning With Noisy Text Supervision (arXiv 2102.05918).

slug: align-noisy
number: 16
shelf: 1
kind: data_recipe
config: |
  recipes: [{type: frequency_filters}]
  objectives: [{type: infonce, options: {pair: [image, text], label_smoothing: 0.1}}]
left_out: the 1.8 billion pairs, EfficientNet-L2 and BERT-large. The paper learns the temperature itself from 1.0;
  infonce learns its logarithm from 0.07. Test-set near-duplicates are dropped by equal ids or files, not by likeness.
  Queries of a picture plus or minus a text are sums of embeddings, which need no code of their own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmllm.contracts import DataRecipe
from mmllm.data.captions import captions_of
from mmllm.errors import UserError
from mmllm.registry import register

WHERE = "data recipe 'frequency_filters'"


@register("data_recipe", "frequency_filters")
class FrequencyFilters(DataRecipe):
    """Cleans web data by sizes and counts alone (section 3). ``removed`` counts what each rule took.

    A picture goes with all its texts; a text goes alone, and a record whose texts all go goes with them. All counts are
    of the data as they come, so that they depend on no order. A rule whose number is None is off.

    Args:
        min_side: of a picture, pixels of the shorter side must be more.
        max_aspect: longer by shorter side must be less.
        max_texts_per_image: a picture with more different texts is dropped.
        max_images_per_text: a text of more different pictures is dropped.
        min_words, max_words: of a text.
        vocabulary: how many of the most frequent words and pairs of neighbouring words are known; a text with a word
            that none of them holds is dropped.
        held_out: record ids or picture files of test sets.
        sizes: True opens each picture for its size where the record's ``meta`` has no ``width`` and ``height``; False
            leaves the two rules of size to those that have.
    """

    def __init__(
        self,
        min_side: int | None = 200,
        max_aspect: float | None = 3.0,
        max_texts_per_image: int | None = 1000,
        max_images_per_text: int | None = 10,
        min_words: int = 3,
        max_words: int = 20,
        vocabulary: int | None = 100_000_000,
        held_out: Sequence[str] = (),
        sizes: bool = True,
    ):
        if min_words > max_words:
            raise UserError(f"min_words {min_words} is above max_words {max_words}", WHERE)
        self.min_side, self.max_aspect = min_side, max_aspect
        self.max_texts_per_image, self.max_images_per_text = max_texts_per_image, max_images_per_text
        self.min_words, self.max_words, self.vocabulary = min_words, max_words, vocabulary
        self.held_out, self.sizes = {str(h) for h in held_out}, sizes
        self.removed: Counter[str] = Counter()

    def apply(self, records: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        held = list(records)
        self.removed = Counter()
        texts_of_image: dict[str, set[str]] = {}
        images_of_text: dict[str, set[str]] = {}
        for record in held:
            for text in said(record):
                texts_of_image.setdefault(picture(record), set()).add(text)
                images_of_text.setdefault(text, set()).add(picture(record))
        known = self._known(held)
        for record in held:
            rule = self._bad_picture(record, len(texts_of_image.get(picture(record), ())))
            if rule:
                self.removed[rule] += 1
                continue
            kept = []
            for text in said(record):
                rule = self._bad_text(text, len(images_of_text[text]), known)
                if rule:
                    self.removed[rule] += 1
                else:
                    kept.append(text)
            if len(kept) == len(said(record)):
                yield record
            elif kept:
                yield {**record, "text": kept}
        if self.removed:
            taken = ", ".join(f"{rule} {n:,}" for rule, n in sorted(self.removed.items()))
            print(f"frequency_filters: of {len(held):,} records, removed {taken}", flush=True)

    def _bad_picture(self, record: dict[str, Any], texts: int) -> str | None:
        """The rule that takes a record, None where none does."""
        if self.held_out & {str(record.get("id")), picture(record)}:
            return "held_out"
        size = self._size(record)
        if size is not None and self.min_side is not None and min(size) <= self.min_side:
            return "min_side"
        if size is not None and self.max_aspect is not None and max(size) >= self.max_aspect * min(size):
            return "max_aspect"
        if self.max_texts_per_image is not None and texts > self.max_texts_per_image:
            return "max_texts_per_image"
        return None

    def _bad_text(self, text: str, images: int, known: set[str] | None) -> str | None:
        """The rule that takes a text, None where none does."""
        words = text.lower().split()
        if self.max_images_per_text is not None and images > self.max_images_per_text:
            return "max_images_per_text"
        if not self.min_words <= len(words) <= self.max_words:
            return "words"
        if known is not None and any(w not in known for w in words):
            return "vocabulary"
        return None

    def _known(self, records: list[dict[str, Any]]) -> set[str] | None:
        """Words that the most frequent words and pairs of words hold."""
        if self.vocabulary is None:
            return None
        count: Counter[str] = Counter()
        for record in records:
            for text in said(record):
                words = text.lower().split()
                count.update(words)
                count.update(f"{a} {b}" for a, b in zip(words, words[1:]))
        # Equal counts go by the alphabet, so that the order of the records decides nothing.
        frequent = sorted(count, key=lambda w: (-count[w], w))[: self.vocabulary]
        return {w for entry in frequent for w in entry.split()}

    def _size(self, record: dict[str, Any]) -> tuple[int, int] | None:
        if self.min_side is None and self.max_aspect is None:
            return None
        meta = record.get("meta") or {}
        if "width" in meta and "height" in meta:
            return int(meta["width"]), int(meta["height"])
        image = record.get("image")
        if not self.sizes or not isinstance(image, str | Path):
            return None
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(image) as opened:
                return opened.size
        except (OSError, UnidentifiedImageError):
            return None  # the screening that follows says what is wrong with it


def said(record: dict[str, Any]) -> list[str]:
    """A record's texts."""
    return [str(text) for _, text in captions_of(record)]


def picture(record: dict[str, Any]) -> str:
    """What tells a record's picture from others."""
    return str(record.get("image") or record.get("id"))
