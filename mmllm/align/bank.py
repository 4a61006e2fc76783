"""All items of a source as embeddings, for objectives that look at the whole training set (clusters, neighbours)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmllm.blocks.ranks import Ranks
from mmllm.contracts import BatchSampler, Objective, StepHook

if TYPE_CHECKING:
    from mmllm.align.source import AlignSource
    from mmllm.align.step import AlignStep


class FeatureBank:
    """Plain views of a source's usable items through the model as it is now.

    Attributes:
        items: [N] item numbers, what ``AlignBatch.items`` refers to.
        labels: of each.
    """

    def __init__(self, source: AlignSource, step: AlignStep, batch_size: int = 256):
        self.source, self.step, self.batch_size = source, step, batch_size
        self.items = torch.tensor(source.usable)
        self.labels = [source.labels[i] for i in source.usable]
        self._rows = lru_cache(maxsize=None)(self._run)

    def embedding(self, stream: str) -> tuple[Tensor, Tensor]:
        """Unit rows [R, P] and the item number of each, [R]."""
        return self._rows(stream, "embedding")

    def pooled(self, stream: str) -> tuple[Tensor, Tensor]:
        """The tower's pooled features [R, D] and the item number of each, [R]."""
        return self._rows(stream, "pooled")

    @torch.no_grad()
    def _run(self, stream: str, what: str) -> tuple[Tensor, Tensor]:
        was = self.step.training
        self.step.eval()
        rows, items = [], []
        device = next(iter(self.step.buffers())).device
        for at in range(0, len(self.source.usable), self.batch_size):
            batch = self.source.collate(self.source.usable[at : at + self.batch_size], None)
            inputs = {k: v for k, v in batch["streams"][stream].items() if k != "extras"}
            if not inputs:
                continue
            inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
            out = self.step.model.stream(stream, inputs, [what])
            rows.append(out.embedding if what == "embedding" else out.features.pooled)  # type: ignore[union-attr]
            owner = batch["owners"].get(stream)
            items.append(batch["items"] if owner is None else batch["items"][owner])
        self.step.train(was)
        return torch.cat(rows), torch.cat(items)


class EpochHook(StepHook):
    """Calls ``on_epoch`` of objectives that have one, in the first step and at the start of each later epoch.

    An epoch of an objective is one pass over its first source. Whether a step starts one follows from its number, so
    that a resumed run neither misses nor repeats one.
    """

    def __init__(self, sources: dict[str, Any], items_per_step: int):
        self.sources, self.items_per_step = sources, items_per_step
        self._called = -1

    @staticmethod
    def starts_epoch(step: int, items_per_step: int, items: int) -> bool:
        """Whether the batch of a step is the first with items of its epoch."""
        return step == 0 or step * items_per_step // items != (step - 1) * items_per_step // items

    def before_forward(self, model: Any, batch: Any, step: int) -> None:
        if step == self._called:  # a further micro-batch of the same step
            return
        self._called = step
        for objective, term in zip(model.objectives, model.terms):
            source = self.sources[term.sources[0]]
            if self.starts_epoch(step, source.batch_size * self.items_per_step, len(source.usable)):
                objective.on_epoch(FeatureBank(source, model))


def prepare(step: AlignStep, sources: Mapping[str, AlignSource]) -> None:
    """Shows objectives and samplers that ask for it (``prepare``) the bank of their source, before the first step."""
    for objective, term in zip(step.objectives, step.terms):
        if type(objective).prepare is not Objective.prepare:  # type: ignore[attr-defined]
            objective.prepare(FeatureBank(sources[term.sources[0]], step))  # type: ignore[operator]
    for source in sources.values():
        sampler = source.sampler(source.batch_size * Ranks().size)
        if type(sampler).prepare is not BatchSampler.prepare:
            sampler.prepare(FeatureBank(source, step))
