"""Objectives whose two directions have different losses: rows of the first stream, then rows of the second."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmllm.align.objectives import PairObjective, _item_means, _kept
from mmllm.contracts import AlignBatch


class DirectedObjective(PairObjective):
    """Base; what is said of PairObjective holds here, too.

    A subclass gives ``one_way``, which is told the direction; ``loss`` and the saving by symmetry are not used.
    """

    def one_way(self, rows: Any, cols: Any, batch: AlignBatch, *, forth: bool, target_fn: Any, **how: Any) -> Tensor:
        """Loss of each row against all columns, [R].

        Args:
            forth: True where the rows are those of the first stream of the pair.
            target_fn: which pairs belong together; ``how`` holds ``score_fn`` and ``ranks``, to be handed on.
        """
        raise NotImplementedError

    def prepared(self, rows: Any, first: bool) -> Any:
        """A stream's rows before both directions (detached, changed...); ``first``: of the pair's first stream."""
        return rows

    def forward(self, batch: AlignBatch) -> dict[str, Tensor]:
        size = len(batch)
        (rows, own), (cols, theirs) = (self._rows(batch, s) for s in self.pair)
        rows, cols = self.prepared(rows, True), self.prepared(cols, False)
        valid: Tensor | None = None
        if own is not None or theirs is not None:
            device = (own if own is not None else theirs).device  # type: ignore[union-attr]
            everyone = torch.arange(size, device=device)
            own, theirs = (everyone if o is None else o for o in (own, theirs))
            valid = torch.isin(everyone, own) & torch.isin(everyone, theirs)
            (rows, own), (cols, theirs) = (_kept(x, o, valid[o]) for x, o in ((rows, own), (cols, theirs)))
            if not valid.any():
                return {"loss": batch.logit_scale[self.pair_name] * everyone.float() * 0.0, "valid": valid}
        both = []
        for forth in (True, False):
            a, b = (rows, cols) if forth else (cols, rows)
            targets = self._targets(batch, own, theirs) if forth else self._targets(batch, theirs, own)
            each = self.one_way(a, b, batch, forth=forth, target_fn=targets, score_fn=self._fn(a), ranks=batch.ranks)
            owner = own if forth else theirs
            both.append(each if owner is None else _item_means(each, owner, size))
        loss = 0.5 * (both[0] + both[1])
        return {"loss": loss} if valid is None else {"loss": loss, "valid": valid}

    def _fn(self, rows: Any) -> Any:
        from mmllm.contracts import Scorer

        plain = type(self.scorer).score is Scorer.score and isinstance(rows, Tensor)
        return None if plain else self.scorer.score
