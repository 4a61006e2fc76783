"""One training step of alignment as a module: runs the streams of each source and sums the weighted objectives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmllm.align.model import AlignModel
from mmllm.contracts import AlignBatch, Objective
from mmllm.errors import UserError


@dataclass
class Term:
    """One weighted objective and the sources it looks at."""

    name: str
    weight: float
    sources: tuple[str, ...]


class AlignStep(nn.Module):
    """``forward(batch) -> {"loss", named terms}``; what MMTrainer trains in one phase.

    Args:
        vocabularies: source -> ``{"index": {name: i}, "embedding": [V, D]}`` for objectives that need words.
    """

    def __init__(
        self,
        model: AlignModel,
        objectives: list[Objective],
        terms: list[Term],
        want: dict[str, dict[str, set[str]]],
        vocabularies: dict[str, dict[str, Any]] | None = None,
    ):
        super().__init__()
        self.model, self.objectives = model, nn.ModuleList(objectives)
        self.terms, self.want = terms, want
        self.vocabularies = vocabularies or {}

    def assemble(self, source: str, batch: dict[str, Any]) -> AlignBatch:
        """The AlignBatch of one source's inputs."""
        streams = {
            name: self.model.stream(name, inputs, sorted(self.want[source][name]))
            for name, inputs in batch["streams"].items()
            if name in self.want[source]
        }
        out = AlignBatch(streams, ids=batch["ids"], labels=batch["labels"], boxes=batch["boxes"])
        out.languages = batch.get("languages")
        out.logit_scale = {p: self.model.scale(p) for p in self.model.logit_scale}
        out.logit_bias = dict(self.model.logit_bias.items())
        if source in self.vocabularies:
            out.extras["vocabulary"] = self.vocabularies[source]
        return out

    def _pair_state(self, ready: dict[str, AlignBatch]) -> dict[str, Tensor]:
        """For each contrasted pair its ``logit_scale`` and the distance of the two streams' mean embeddings (gap)."""
        out: dict[str, Tensor] = {}
        for objective, term in zip(self.objectives, self.terms):
            pair: str | None = getattr(objective, "pair_name", None)
            if pair is None:
                continue
            streams = ready[term.sources[0]].streams
            means = [streams[s].embedding.detach().float().mean(0) for s in pair.split(":")]  # type: ignore[union-attr]
            out[f"logit_scale/{pair}"] = self.model.scale(pair).detach()
            out[f"gap/{pair}"] = (means[0] - means[1]).norm()
        return out

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        ready = {name: self.assemble(name, b) for name, b in batch["sources"].items()}
        out: dict[str, Tensor] = {}
        losses = []
        for objective, term in zip(self.objectives, self.terms):
            for source in term.sources:
                result = objective(ready[source])
                loss = result["loss"].mean()
                losses.append(term.weight * loss)
                tag = term.name if len(term.sources) == 1 else f"{term.name}/{source}"
                out[tag] = loss.detach()
                out |= {k if k not in out else f"{source}/{k}": v.detach() for k, v in result.items() if k != "loss"}
        out |= self._pair_state(ready)
        out["loss"] = torch.stack(losses).sum()
        return out


def needed(
    objectives: list[Objective], terms: list[Term], streams: dict[str, list[str]]
) -> dict[str, dict[str, set[str]]]:
    """What each source must give: source -> stream -> {"embedding", "token_embedding"}.

    Args:
        streams: source -> the streams that it feeds.

    Raises:
        UserError: an objective needs a stream that its source does not feed.
    """
    want: dict[str, dict[str, set[str]]] = {s: {} for s in streams}
    for objective, term in zip(objectives, terms):
        for source in term.sources:
            for need in sorted(objective.needs):
                if "." not in need:
                    continue
                stream, what = need.rsplit(".", 1)
                if stream not in streams[source]:
                    do = f"add {stream} to its streams, or name other 'sources' for the objective"
                    raise UserError(f"objective '{term.name}' needs stream '{stream}'", f"source '{source}'", do)
                kind = "token_embedding" if what.startswith("token") else "embedding"
                want[source].setdefault(stream, set()).add(kind)
    return want
