"""Contrasting with Symile: Simple Model-Agnostic Representation Learning for Unlimited Modalities (arXiv 2411.01053).

slug: symile
number: 11
shelf: 1
kind: objective
config: "objectives: [{type: symile, options: {streams: [image, text, audio]}}]"
left_out: the indicator of missing modalities that the paper's encoders read; a missing one is a learned vector here.
  The medical data.
differs: the script of the synthetic experiments takes the other tuples of the batch as negatives, the package shuffles
  each modality by itself; the latter is here. Unit vectors whose products are about 1 / sqrt(D) smaller than cosines
  need a larger scale at the start, 1 / 0.07 in the paper.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmllm.align.config import MeasureConfig
from mmllm.contracts import AlignBatch, Objective
from mmllm.errors import UserError, unknown
from mmllm.evaluate.ranking import positives_by_key, rank_positives
from mmllm.evaluate.stats import mean_interval
from mmllm.registry import register
from mmllm.report.figures import Figure

NEGATIVES = ("shuffled", "all")
COMBINE = ("product", "sum")
MAX_SCALE = 100.0


@register("objective", "symile")
class Symile(Objective):
    """Contrast of whole tuples by the multilinear inner product, the sum over the product of all vectors' entries; it
    bounds their total correlation (equations 3 and 4). Mean over the streams of the loss with that stream as anchor.

    Args:
        streams: two or more, one row per item.
        negatives: ``shuffled``: for each anchor as many as the batch has items, of which the other streams are shuffled
            each by itself; ``all``: every combination of the other streams' rows, B ** (M - 1) of them.
        scale: of the products at the start; learned, at most 100.
        placeholder: a learned vector stands for a modality that an item lacks, which is then no anchor; without it such
            items take no part.
    """

    def __init__(
        self, streams: Sequence[str], negatives: str = "shuffled", scale: float = 1 / 0.07, placeholder: bool = False
    ):
        super().__init__()
        where = "objective 'symile'"
        if len(set(streams)) < 2 or len(set(streams)) != len(streams):
            raise UserError(f"streams must name two or more different ones (got {list(streams)})", where)
        if negatives not in NEGATIVES:
            raise unknown("negatives", negatives, NEGATIVES, where)
        if not 0 < scale <= MAX_SCALE:
            raise UserError(f"scale must be above 0 and at most {MAX_SCALE:g} (got {scale})", where)
        # Not ``self.streams``: that names what an objective brings along.
        self.modalities, self.negatives, self.placeholder = tuple(streams), negatives, placeholder
        self.needs = frozenset(f"{s}.embedding" for s in streams)
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))
        self.missing = nn.ParameterList()

    def setup(self, model: Any) -> None:
        if self.placeholder:
            size = model.embedding_dim
            self.missing = nn.ParameterList([nn.Parameter(torch.randn(size)) for _ in self.modalities])

    def forward(self, batch: AlignBatch) -> dict[str, Tensor]:
        size = len(batch)
        rows, there = zip(*(self._rows(batch, k, size) for k in range(len(self.modalities))))
        complete = torch.stack(there).all(0)
        if not self.placeholder:
            rows, there = [r[complete] for r in rows], [complete[complete]] * len(rows)
        scale = self.log_scale.exp().clamp(max=MAX_SCALE)
        # A function of the step, so that all processes shuffle alike and a resumed run goes on as it would have.
        generator = torch.Generator().manual_seed(batch.step)
        each = torch.stack([self._anchor(rows, k, scale, generator) for k in range(len(rows))])
        anchors = torch.stack(list(there))
        loss = (each * anchors).sum(0) / anchors.sum(0).clamp(min=1)
        valid = complete
        if self.placeholder:
            valid = anchors.sum(0) > 1
        elif not complete.all():
            loss = loss.new_zeros(size).index_put((complete.nonzero()[:, 0],), loss)
        return {"loss": loss, "valid": valid, "symile_scale": scale}

    def _rows(self, batch: AlignBatch, number: int, size: int) -> tuple[Tensor, Tensor]:
        """[B, P] with placeholders (or zeros), and [B] which items have the stream."""
        name = self.modalities[number]
        stream = batch.streams[name]
        rows = stream.embedding
        assert rows is not None
        if stream.owner is None:
            return rows, torch.ones(len(rows), dtype=torch.bool, device=rows.device)
        if len(stream.owner.unique()) != len(stream.owner):
            do = "choose captions: random or first"
            raise UserError(f"'{name}' has several rows for an item", "objective 'symile'", do)
        there = torch.zeros(size, dtype=torch.bool, device=rows.device)
        there[stream.owner] = True
        filled = rows.new_zeros(size, rows.shape[1])
        if self.placeholder:
            filled = F.normalize(self.missing[number], dim=-1).to(rows).expand(size, -1)
        return filled.index_put((stream.owner,), rows), there

    def _anchor(self, rows: Sequence[Tensor], number: int, scale: Tensor, generator: torch.Generator) -> Tensor:
        """[B]: cross-entropy of each anchor row against the products of the other streams."""
        anchor, others = rows[number], [r for k, r in enumerate(rows) if k != number]
        own = torch.stack(others).prod(0)
        count = len(anchor)
        if self.negatives == "shuffled":
            orders = [torch.randperm(count, generator=generator).to(anchor.device) for _ in others]
            logits = anchor @ torch.stack([r[o] for r, o in zip(others, orders)]).prod(0).T
            at = torch.eye(count, dtype=torch.bool, device=anchor.device)
            logits = torch.where(at, (anchor * own).sum(-1, keepdim=True), logits)
            return F.cross_entropy(scale * logits, torch.arange(count, device=anchor.device), reduction="none")
        products = others[0]
        for r in others[1:]:
            products = (products[:, None] * r[None]).flatten(0, 1)
        # Combination (i, i, ..., i) stands at i * (1 + B + B^2 + ...).
        step = sum(count**k for k in range(len(others)))
        return F.cross_entropy(
            scale * anchor @ products.T, step * torch.arange(count, device=anchor.device), reduction="none"
        )


@register("measure", "from_the_others")
def from_the_others(
    stage: Any, measure: MeasureConfig, records: list[dict[str, Any]], combine: str = "product"
) -> list[Figure]:
    """Retrieval of the last stream's items from all other streams together, among those of these records: by the
    product of the others' embeddings (symile, section 3.3), or by their sum (losses on pairs).

    Args:
        combine: ``product`` or ``sum``.
    """
    from mmllm.align.record_keys import texts_of
    from mmllm.train.align_measures import stream_rows

    if combine not in COMBINE:
        raise unknown("combine", combine, COMBINE, f"measure '{measure.name}'")
    records = [{**r, "text": texts_of(r)[:1]} for r in records]
    *others, last = (stream_rows(stage, measure, s, records)[0] for s in measure.streams)
    if any(len(rows) != len(records) for rows in (*others, last)):
        return [Figure(measure.name, None, note="some records lack a stream")]
    query = torch.stack(others).prod(0) if combine == "product" else torch.stack(others).sum(0)
    keys = [str(r.get("label")) if measure.by == "label" else str(i) for i, r in enumerate(records)]
    ranking = rank_positives(query, last, positives_by_key(keys, keys))
    chance = ranking.metrics((1, 5))
    out = []
    for k in (1, 5):
        value, low, high = mean_interval((ranking.first < k).numpy(), keys)
        note = f"gallery of {len(last)}"
        out.append(
            Figure(
                f"{measure.name}_r{k}", value, "higher", low, high, len(keys), "fraction",
                chance=chance[f"chance_r{k}"], note=note,
            )
        )  # fmt: skip
    return out
