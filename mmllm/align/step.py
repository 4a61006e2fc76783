"""One training step of alignment as a module: runs the streams of each source and sums the weighted objectives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmllm.align.config import WeightConfig
from mmllm.align.gather import gather_batch
from mmllm.align.model import AlignModel
from mmllm.blocks.chunks import chunk_size, in_chunks
from mmllm.blocks.ema import Teacher
from mmllm.blocks.ranks import Ranks
from mmllm.contracts import AlignBatch, Objective, Stream


@dataclass
class Term:
    """One weighted objective and the sources it looks at."""

    name: str
    weight: float | WeightConfig
    sources: tuple[str, ...]

    def weight_at(self, step: int, total: int) -> float:
        """The weight in a step (from 0) of ``total``."""
        return self.weight.at(step, total) if isinstance(self.weight, WeightConfig) else self.weight


class AlignStep(nn.Module):
    """``forward(batch) -> {"loss", named terms, "each", "batches"}``; what MMTrainer trains in one phase.

    ``each`` holds, for terms that give a loss per item, ``(loss [B], valid [B])`` under the term's name; ``batches``
    the AlignBatch of each source, of this process.

    Args:
        want: source -> stream -> what is needed of it.
        vocabularies: source -> ``{"index": {name: i}, "embedding": [V, D]}`` for objectives that need words.
        teachers: stream -> the copies that read it.
        chunk: items that go through a tower at a time, see ``PhaseConfig.chunk_size``; None: all.
        total_steps: of the phase, for weights and momenta that change.
    """

    chunk_sizes: Tensor

    def __init__(
        self,
        model: AlignModel,
        objectives: list[Objective],
        terms: list[Term],
        want: dict[str, dict[str, set[str]]],
        vocabularies: dict[str, dict[str, Any]] | None = None,
        teachers: Mapping[str, Teacher] | None = None,
        chunk: int | Literal["auto"] | None = None,
        total_steps: int = 1,
    ):
        super().__init__()
        self.model, self.objectives = model, nn.ModuleList(objectives)
        self.terms, self.want = terms, want
        self.vocabularies = vocabularies or {}
        self.teachers = nn.ModuleDict(teachers or {})
        self.hooks = nn.ModuleList()  # step hooks with buffers, so that checkpoints hold them
        self.chunk, self.total_steps = chunk, total_steps
        self.progress = 0.0
        # Chosen once and kept in checkpoints: chunks of another size would draw other random numbers after a resume.
        self.register_buffer("chunk_sizes", torch.zeros(len(self._chunk_places()), dtype=torch.long))

    def _chunk_places(self) -> dict[tuple[str, str], int]:
        places = [(source, stream) for source, streams in sorted(self.want.items()) for stream in sorted(streams)]
        return {place: k for k, place in enumerate(places)}

    # ---- streams ----

    def run_stream(self, source: str, name: str, inputs: dict[str, Any]) -> Stream:
        """One stream's features and projections, in chunks where the phase says so."""
        want = sorted(self.want[source][name])
        if name in self.teachers:
            with torch.no_grad():
                teacher: Any = self.teachers[name]
                modules = self.model.modules_of(name, want) | dict(teacher.copies.items())
                return self._chunked(source, name, partial(self.model.stream, name, want=want, modules=modules), inputs)
        return self._chunked(source, name, partial(self.model.stream, name, want=want), inputs)

    def _chunked(self, source: str, name: str, encode: Callable[[Any], Stream], inputs: dict[str, Any]) -> Stream:
        if self.chunk is None:
            return encode(inputs)
        if isinstance(self.chunk, int):
            return in_chunks(encode, inputs, self.chunk)
        place = self._chunk_places()[source, name]
        if not int(self.chunk_sizes[place]):
            self.chunk_sizes[place] = chunk_size(encode, inputs)
        return in_chunks(encode, inputs, int(self.chunk_sizes[place]))

    def assemble(self, source: str, batch: dict[str, Any]) -> AlignBatch:
        """The AlignBatch of one source's inputs."""
        owners, boxes = batch.get("owners") or {}, batch.get("view_boxes") or {}
        streams = {}
        for name, inputs in batch["streams"].items():
            if name not in self.want[source]:
                continue
            inputs = dict(inputs)
            extras = inputs.pop("extras", {})
            if not inputs:  # no item of this batch has it
                streams[name] = self._empty(source, name)
            else:
                streams[name] = self.run_stream(source, name, inputs)
            streams[name].owner, streams[name].extras = owners.get(name), extras
            streams[name].boxes = boxes.get(name)
        out = AlignBatch(streams, **{k: batch[k] for k in ("ids", "labels", "boxes")})
        for name in ("groups", "languages", "items", "label_ids"):
            setattr(out, name, batch.get(name))
        out.logit_scale = {p: self.model.scale(p) for p in self.model.logit_scale}
        out.logit_bias = dict(self.model.logit_bias.items())
        out.step, out.progress = int(batch.get("step", 0)), self.progress
        out.extras["meta"] = batch.get("meta")
        if source in self.vocabularies:
            out.extras["vocabulary"] = self.vocabularies[source]
        return out

    def _empty(self, source: str, name: str) -> Stream:
        device = self.chunk_sizes.device
        out = Stream()
        if "embedding" in self.want[source][name]:
            # With a gradient, so that all processes take part in the backward of what is gathered.
            out.embedding = torch.zeros(0, self.model.embedding_dim, device=device, requires_grad=True)
        if "token_embedding" in self.want[source][name]:
            out.token_embedding = torch.zeros(0, 1, self.model.embedding_dim, device=device)
            out.token_mask = torch.zeros(0, 1, dtype=torch.bool, device=device)
        return out

    # ---- the loss ----

    def forward(self, batch: dict[str, Any]) -> dict[str, Any]:
        step = int(batch.get("step", 0))
        self.progress = step / max(self.total_steps, 1)
        ready = {
            name: self.assemble(name, {**b, "step": step}) for name, b in batch["sources"].items() if self.want[name]
        }
        ranks = Ranks()
        out: dict[str, Any] = {"each": {}}
        losses = []
        for objective, term in zip(self.objectives, self.terms):
            weight = term.weight_at(step, self.total_steps)
            for source in term.sources:
                seen = self._for(objective, ready[source], ranks, bool(batch["sources"][source].get("ragged")))
                result = objective(seen)
                tag = term.name if len(term.sources) == 1 else f"{term.name}/{source}"
                tag = tag if tag not in out else f"{tag}/{source}"
                loss = self._mean(tag, result, out["each"])
                losses.append(weight * loss)
                out[tag] = loss.detach()
                named = {k: v for k, v in result.items() if k not in ("loss", "valid")}
                out |= {k if k not in out else f"{source}/{k}": v.detach() for k, v in named.items()}
            if isinstance(term.weight, WeightConfig):
                out[f"weight/{term.name}"] = torch.tensor(weight)
        out |= self._pair_state(ready)
        out["loss"] = torch.stack(losses).sum()
        out["batches"] = ready
        return out

    @staticmethod
    def _for(objective: Any, batch: AlignBatch, ranks: Ranks, ragged: bool) -> AlignBatch:
        """The batch as an objective asks for it; processes with unequal rows can only be gathered."""
        batch.ranks = None
        if ranks.size == 1:
            return batch
        if objective.gathered or ragged:
            streams = {n.rsplit(".", 1)[0] for n in objective.needs if "." in n} & set(batch.streams)
            return gather_batch(batch, ranks, streams)
        batch.ranks = ranks
        return batch

    @staticmethod
    def _mean(tag: str, result: dict[str, Tensor], each: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
        loss = result["loss"]
        if not loss.ndim:
            return loss
        valid = result.get("valid")
        valid = torch.ones_like(loss, dtype=torch.bool) if valid is None else valid.bool()
        each[tag] = loss, valid
        return loss.mean() if bool(valid.all()) else (loss * valid).sum() / valid.sum().clamp(min=1)

    def _pair_state(self, ready: dict[str, AlignBatch]) -> dict[str, Tensor]:
        """For each contrasted pair its ``logit_scale`` and the distance of the two streams' mean embeddings (gap)."""
        out: dict[str, Tensor] = {}
        for objective, term in zip(self.objectives, self.terms):
            pair: str | None = getattr(objective, "pair_name", None)
            if pair is None or pair not in self.model.logit_scale:
                continue
            out[f"logit_scale/{pair}"] = self.model.scale(pair).detach()
            streams = ready[term.sources[0]].streams
            rows = [streams[s].embedding for s in pair.split(":")]
            if all(x is not None and len(x) for x in rows):
                means = [x.detach().float().mean(0) for x in rows]  # type: ignore[union-attr]
                out[f"gap/{pair}"] = (means[0] - means[1]).norm()
        return out

    def after_step(self, model: nn.Module) -> None:
        """Teachers follow what has trained."""
        for teacher in self.teachers.values():
            teacher.follow(self.progress)  # type: ignore[operator]

    def gradient_checkpointing_enable(self, **_: Any) -> None:
        """See ``AlignModel.gradient_checkpointing_enable``; the Trainer calls this name, with options for layers."""
        self.model.gradient_checkpointing_enable()
