"""Data recipes that make clean records worse in a known way: wrong partners, and fewer of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from mmllm.contracts import DataRecipe
from mmllm.data.records import MEDIA_FIELDS
from mmllm.errors import UserError, unknown
from mmllm.registry import register


def check_share(share: float, where: str) -> None:
    """Raises UserError for a share outside 0..1."""
    if not 0 <= share <= 1:
        raise UserError(f"share must be within 0..1 (got {share})", where)


@register("data_recipe", "mismatch")
class Mismatch(DataRecipe):
    """Gives a share of the records another record's medium or text; ``meta.mismatch`` says which (True or False).

    The other record is one of another label, where there is one. A text brings its label along: a label that stayed
    would tell the loss which texts are wrong. Ids, groups and everything else stay.

    Args:
        field: ``text`` or a medium; records without it stay as they are.
        share: of the records that have it, rounded.
        seed: of the choice.
    """

    def __init__(self, field: str = "text", share: float = 0.3, seed: int = 0):
        check_share(share, "data recipe 'mismatch'")
        if field not in (*MEDIA_FIELDS, "text"):
            raise unknown("field", field, (*MEDIA_FIELDS, "text"), "data recipe 'mismatch'")
        self.field, self.share, self.seed = field, share, seed

    def apply(self, records: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        held = list(records)
        able = [i for i, r in enumerate(held) if r.get(self.field)]
        rng = np.random.default_rng(self.seed)
        wrong = set(rng.permutation(len(able))[: round(self.share * len(able))].tolist())
        place = {item: k for k, item in enumerate(able)}
        for number, record in enumerate(held):
            changed = place.get(number) in wrong
            meta = {**(record.get("meta") or {}), "mismatch": changed}
            moved = self._moved(record, [held[i] for i in rng.permutation(able)]) if changed else {}
            yield {**record, **moved, "meta": meta}

    def _moved(self, record: dict[str, Any], others: list[dict[str, Any]]) -> dict[str, Any]:
        """What the first fitting one of ``others`` gives."""
        differ = (o for o in others if o.get("label", o[self.field]) != record.get("label", record[self.field]))
        giver = next(differ, next((o for o in others if o is not record), record))
        names = ("text", "label") if self.field == "text" else (self.field,)
        return {k: giver[k] for k in names if k in giver}


@register("data_recipe", "subset")
class Subset(DataRecipe):
    """Keeps a share of the records, drawn at random, in their order.

    Args:
        share: of the records, rounded.
        seed: of the choice; a smaller share of the same seed is a part of the larger one.
    """

    def __init__(self, share: float, seed: int = 0):
        check_share(share, "data recipe 'subset'")
        self.share, self.seed = share, seed

    def apply(self, records: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        held = list(records)
        order = np.random.default_rng(self.seed).permutation(len(held))
        kept = set(order[: round(self.share * len(held))].tolist())
        yield from (r for i, r in enumerate(held) if i in kept)
