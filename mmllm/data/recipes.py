"""Data recipes: records made out of records before a source is screened.

Others join by ``@register("data_recipe", NAME)``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

import mmllm.data.bags  # noqa: F401  (registers its recipes)
import mmllm.data.box_numbers  # noqa: F401  (registers its recipes)
import mmllm.data.caption_template  # noqa: F401  (registers its recipes)
import mmllm.data.exclusive_or  # noqa: F401  (registers its recipes)
import mmllm.data.grounding  # noqa: F401  (registers its recipes)
import mmllm.data.languages  # noqa: F401  (registers its recipes)
import mmllm.data.noise  # noqa: F401  (registers its recipes)
import mmllm.data.placed  # noqa: F401  (registers its recipes)
import mmllm.data.sequences  # noqa: F401  (registers its recipes)
import mmllm.data.set_of_mark  # noqa: F401  (registers its recipes)
import mmllm.data.sound_pairs  # noqa: F401  (registers its recipes)
from mmllm.contracts import DataRecipe
from mmllm.data.captions import label_of
from mmllm.data.questions import with_article
from mmllm.data.records import MEDIA_FIELDS, Located
from mmllm.registry import make, register


def apply_recipes(
    items: Iterable[Located], specs: Sequence[str | dict[str, Any]], where: object = "recipes"
) -> Iterator[Located]:
    """Records with their places after recipes, one after the other; what is broken passes through untouched.

    A record that a recipe has made stands under the recipe's name and its number.

    Raises:
        UserError: unknown recipe or option.
    """
    recipes = [make("data_recipe", spec, where) for spec in specs]  # all, before the first reads anything
    for recipe in recipes:
        items = _applied(items, recipe)
    return iter(items)


def _applied(items: Iterable[Located], recipe: DataRecipe) -> Iterator[Located]:
    broken: list[Located] = []
    places: dict[int, Located] = {}

    def sound() -> Iterator[dict[str, Any]]:
        for item in items:
            if item.record is None:
                broken.append(item)
            else:
                places[id(item.record)] = item
                yield item.record

    for number, record in enumerate(recipe.apply(sound())):
        known = places.get(id(record))
        yield known if known is not None and known.record is record else Located(recipe.name, number, record)
    yield from broken


@register("data_recipe", "join_by_label")
class JoinByLabel(DataRecipe):
    """Puts records of one label together: each record of ``field`` gets the media that others of its label have.

    Pictures of things and recordings of their names become records with picture, sound and text. A record whose label
    has no partner stays as it is where ``keep`` is set, else it goes.

    Args:
        field: the medium whose records stay one for one, such as ``image``.
        add: the media to add.
        seed: of the choice among several partners.
        keep: whether records without partner stay (for sources with ``optional`` streams); also the partners' own
            records stay then, so that nothing is lost.
    """

    def __init__(self, field: str = "image", add: Sequence[str] = ("audio",), seed: int = 0, keep: bool = False):
        self.field, self.add, self.seed, self.keep = field, list(add), seed, keep

    def apply(self, records: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        held = list(records)
        partners: dict[tuple[str, str], list[Any]] = {}
        for record in held:
            for medium in self.add:
                if record.get(medium):
                    partners.setdefault((medium, label_of(record)), []).append(record[medium])
        rng = np.random.default_rng(self.seed)
        for record in held:
            missing = [m for m in self.add if not record.get(m)]
            if not record.get(self.field):
                if self.keep:
                    yield record
                continue
            found = {m: partners[m, label_of(record)] for m in missing if (m, label_of(record)) in partners}
            if len(found) == len(missing) or self.keep:
                drawn = {m: choices[rng.integers(len(choices))] for m, choices in found.items()}
                yield {**record, **drawn} if drawn else record


@register("data_recipe", "without")
class Without(DataRecipe):
    """Takes fields away from a share of the records: what a model learns when modalities are missing.

    Args:
        fields: which of them; each record that loses loses one, drawn at random.
        share: of the records.
    """

    def __init__(self, fields: Sequence[str] = MEDIA_FIELDS, share: float = 0.5, seed: int = 0):
        self.fields, self.share, self.seed = list(fields), share, seed

    def apply(self, records: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        rng = np.random.default_rng(self.seed)
        for record in records:
            has = [f for f in self.fields if record.get(f)]
            loses, which = rng.random() < self.share, int(rng.integers(max(len(has), 1)))
            yield {k: v for k, v in record.items() if k != has[which]} if loses and has else record


@register("data_recipe", "names_of_boxes")
class NamesOfBoxes(DataRecipe):
    """Gives scenes a text, the names of their boxes (``a cat, a red car``), in the order of the boxes or a random one.

    Args:
        separate: several texts, one for each name, instead of one text.
        shuffle: draw the order of the names, by ``seed``.
    """

    def __init__(self, separate: bool = False, shuffle: bool = False, seed: int = 0):
        self.separate, self.shuffle, self.seed = separate, shuffle, seed

    def apply(self, records: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        rng = np.random.default_rng(self.seed)
        for record in records:
            names = [with_article(b["text"]) for b in record.get("boxes") or []]
            if self.shuffle:
                names = [names[i] for i in rng.permutation(len(names))]
            if names:
                yield {**record, "text": names if self.separate else ", ".join(names)}
