"""Learning the Unlearned: Mitigating Feature Suppression in Contrastive Learning (arXiv 2402.11816).

slug: mcl
number: 24
shelf: 1
kind: batch_sampler
config: "sampler: {type: mcl, options: {streams: [image], k: 2}}  # in the phase that trains the next encoder, image_2"
left_out: nothing of the method; whether a stage starts from fresh weights or from the last stage's is for the config.
differs: clusters come in random order instead of turns; the released code reads the newest stage's clusters in place of
  every stage's, so that earlier ones are forgotten.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from mmllm.blocks.items import item_rows
from mmllm.blocks.kmeans import kmeans
from mmllm.data.samplers import OneCluster, Seed
from mmllm.errors import UserError
from mmllm.registry import register
from mmllm.report.figures import Figure

WHERE = "sampler 'mcl'"


@register("batch_sampler", "mcl")
class ComplementaryStage(OneCluster):
    """Each batch from items that all earlier stages put into one cluster (section 3.2).

    A stage is a phase that trains streams of its own (``image_2`` beside ``image``). What the embeddings of earlier
    stages tell apart cannot help in such a batch, so that the new encoder has to learn something else.

    Args:
        streams: those of the earlier stages whose embeddings are clustered; they do not train in this phase. None are
            the first stage, whose batches are random.
        k: clusters of each.

    Raises:
        UserError: no cluster fills a batch.
    """

    def __init__(
        self, keys: Sequence[Hashable], batch_size: int, seed: Seed = 0, streams: Sequence[str] = (), k: int = 10
    ):
        if k < 1:
            raise UserError(f"k must be at least 1 (got {k})", WHERE)
        self.streams, self.k = list(streams), k
        OneCluster.__init__(self, [()] * len(keys), batch_size, seed)

    def prepare(self, bank: Any) -> None:
        place = torch.full((len(bank.source.records),), -1)
        place[bank.items] = torch.arange(self.size)
        stages = []
        for number, stream in enumerate(self.streams):
            self._check(bank, stream)
            rows, items = bank.embedding(stream)
            mean, there = item_rows(rows.float(), place[items.cpu()].to(rows.device), self.size)
            if int(there.sum()) < self.k:
                what = f"{int(there.sum())} items of '{stream}' cannot be put into {self.k} clusters"
                raise UserError(what, WHERE, "lower k")
            stages.append(torch.full((self.size,), -1))
            # The same numbers in every later phase, whose seed is another one: clusters are only ever cut up further.
            stages[-1][there.cpu()] = kmeans(mean[there], self.k, self.seed[0] + 1000 * number)[1].cpu()
        OneCluster.__init__(self, composite(stages, self.size), self.batch_size, self.seed)

    def _check(self, bank: Any, stream: str) -> None:
        """Raises UserError for a stream that the source does not feed, or that trains now."""
        if stream not in bank.source.streams:
            do = f"add it to the streams of source '{bank.source.name}'"
            raise UserError(f"its source does not feed stream '{stream}'", WHERE, do)
        model = bank.step.model
        parts = {f"{model.tower_of[model.base(stream)]}.tower", f"{model.owner(stream, 'head')}.head"}
        if parts & model.active:
            do = "leave it out of the phase's trains: an earlier stage stays as it is"
            raise UserError(f"'{(parts & model.active).pop()}' trains in this phase", WHERE, do)


def composite(stages: Sequence[Tensor], size: int) -> list[Hashable]:
    """One key for each item, from its cluster in every stage; [N] each."""
    return [tuple(int(s[i]) for s in stages) for i in range(size)]


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Unit rows of several encoders, [N, P] each, as unit rows [N, S * P]: their cosine is the mean of the cosines."""
    return torch.cat([torch.nn.functional.normalize(p, dim=-1) for p in parts], 1) / len(parts) ** 0.5


def joined_rows(
    stage: Any, measure: Any, streams: Sequence[str], records: list[dict[str, Any]]
) -> tuple[Tensor, list[int]]:
    """The joined embeddings of records that have all of these streams (of texts the first), and their numbers."""
    from mmllm.align.record_keys import texts_of
    from mmllm.train.align_measures import stream_rows

    first = [{**r, "text": texts_of(r)[:1]} for r in records]
    found = [stream_rows(stage, measure, s, first) for s in streams]
    held = sorted(set(found[0][1]).intersection(*(h for _, h in found[1:])))
    rows = [r[[h.index(i) for i in held]] if h != held else r for r, h in found]
    return joined(rows), held


@register("measure", "joined_probe")
def joined_probe(stage: Any, measure: Any, records: list[dict[str, Any]]) -> list[Figure]:
    """k-NN and linear probe for the classes of ``field``, of the measure's streams joined (a stream for each stage)."""
    from mmllm.evaluate.probes import probe_figures
    from mmllm.train.align_measures import class_of

    if measure.train is None:
        raise UserError("it needs 'train'", f"measure '{measure.name}'", "name the records that the probe is fitted to")
    sides = []
    for part in (stage.records(measure.train, measure.recipes), records):
        labelled = [r for r in part if class_of(r, measure.field)]
        rows, held = joined_rows(stage, measure, measure.streams, labelled)
        sides.append((rows, [class_of(labelled[i], measure.field) for i in held]))
    return probe_figures(measure.name, sides[0], sides[1])


@register("measure", "joined_pairs")
def joined_pairs(
    stage: Any, measure: Any, records: list[dict[str, Any]], sides: dict[str, list[str]] | None = None
) -> list[Figure]:
    """Retrieval between sides, each of several streams joined: ``sides: {image: [image, image_2], text: [...]}``."""
    from mmllm.evaluate.ranking import pair_figures

    if not sides or len(sides) < 2:
        raise UserError("it needs two 'sides'", f"measure '{measure.name}', options")
    found = {name: joined_rows(stage, measure, streams, records) for name, streams in sides.items()}
    rows, keys = {n: r for n, (r, _) in found.items()}, {n: h for n, (_, h) in found.items()}
    return pair_figures(measure.name, rows, keys)
