"""The types that the rooms meet in: features, batches, and the small base classes that methods plug into."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Features:
    """What a tower returns.

    Attributes:
        tokens: [B, N, D].
        mask: [B, N] bool, True where a token is valid.
        pooled: [B, D].
        grid: (t, h, w) when the tokens after ``num_prefix`` lie on a grid, else None.
        num_prefix: class tokens before the grid.
        layers: intermediate outputs asked for by ``tower(..., layers=(2, -1))``: index -> [B, N, D], the same tokens;
            0 is the input of the first block, k the output of block k, -1 that of the last.
        input_ids: [B, N] of a text tower.
    """

    tokens: Tensor
    mask: Tensor
    pooled: Tensor
    grid: tuple[int, int, int] | None = None
    num_prefix: int = 0
    layers: dict[int, Tensor] | None = None
    input_ids: Tensor | None = None


@dataclass
class Stream:
    """One named stream of a batch (``image``, ``text``, ``image@strong``, ``text[2]``): features and projections.

    Attributes:
        embedding: [B, P], unit norm, what a pooled head gives.
        token_embedding: [B, M, P], what a token-level head (a connector) gives; ``token_mask`` [B, M] bool.
        present: [B] bool, False where the record lacks this modality; None means all are present.
        owner: [B'] index of the item that each row belongs to, for streams with several rows per item.
    """

    features: Features | None = None
    embedding: Tensor | None = None
    token_embedding: Tensor | None = None
    token_mask: Tensor | None = None
    present: Tensor | None = None
    owner: Tensor | None = None


@dataclass
class AlignBatch:
    """What an objective sees: all streams of the gathered batch (all ranks, all chunks).

    Attributes:
        boxes: per item, a list of ``{"xyxy": [x0, y0, x1, y1] in 0..1, "text": str}``.
        logit_scale: pair name ("image:text") -> scalar, already exponentiated.
        logit_bias: pair name -> scalar.
    """

    streams: dict[str, Stream]
    ids: list[str] = field(default_factory=list)
    labels: list[str] | None = None
    groups: list[str] | None = None
    languages: list[str] | None = None
    boxes: list[list[dict[str, Any]]] | None = None
    logit_scale: dict[str, Tensor] = field(default_factory=dict)
    logit_bias: dict[str, Tensor] = field(default_factory=dict)
    extras: dict[str, Any] = field(default_factory=dict)


class Objective(nn.Module):
    """A loss on an AlignBatch; may own parameters, buffers and queues.

    Class attributes:
        needs: what must be in the batch, such as ``image.tokens`` or ``text@mlm.input_ids``.
        two_pass: True when the loss is right under the two-pass big-batch step (features detached, then re-run).
        lr_multiplier: factor on the learning rate of the objective's own parameters.
    """

    needs: frozenset[str] = frozenset()
    two_pass: bool = True
    lr_multiplier: float = 1.0

    def forward(self, batch: AlignBatch) -> dict[str, Tensor]:
        """Returns ``{"loss": scalar or [B], "valid": [B] bool (optional), ...named terms for the log}``."""
        raise NotImplementedError

    def after_step(self, model: nn.Module) -> None:
        """Called after each optimizer step (EMA, queues)."""

    def on_epoch(self, bank: Any) -> None:
        """Called at the start of an epoch with the feature bank of the training set."""


class Tower(nn.Module):
    """An encoder of one modality; ``forward(**inputs, layers=()) -> Features``.

    Attributes:
        hidden_size: width of the tokens.
        trains: the parameters that a ``train:`` choice lets train (``mmllm.towers.apply_train``); None: no choice was
            made and all of them may.
    """

    modality: str = ""
    hidden_size: int = 0
    trains: list[nn.Parameter] | None = None

    @property
    def pooled_size(self) -> int:
        """Width of ``Features.pooled``."""
        return self.hidden_size

    def trainable(self) -> list[nn.Parameter]:
        """What may go into an optimizer."""
        return list(self.parameters()) if self.trains is None else list(self.trains)

    def train(self, mode: bool = True) -> Tower:
        """Parts that a choice froze stay in eval mode: their dropout and BatchNorm must not move."""
        super().train(mode)
        if mode and self.trains is not None:
            chosen = {id(p) for p in self.trains}
            for module in self.modules():
                inside = [id(p) for p in module.parameters()]
                if (inside or not chosen) and chosen.isdisjoint(inside):
                    module.eval()
        return self

    def frozen_copy(self) -> Tower:
        """A copy in eval mode for running over a data set; a tower may fold layers together in it."""
        return copy.deepcopy(self).eval()

    def to_config(self) -> dict[str, Any]:
        """A JSON-able dict from which ``build_tower`` makes the same architecture without weights."""
        raise NotImplementedError

    def preprocessor(self) -> Any:
        """The image processor, feature extractor or tokenizer that makes this tower's inputs."""
        raise NotImplementedError

    def num_tokens(self, length: Any = None) -> int:
        """Tokens for one input; ``length`` is the number of valid frames for audio, None for a fixed-size picture."""
        raise NotImplementedError


class Connector(nn.Module):
    """Carries tower features into the LLM's embedding space."""

    def forward(self, features: Features, text: Features | None = None) -> tuple[Tensor, Tensor]:
        """Returns tokens [B, M, D_out] and mask [B, M] bool."""
        raise NotImplementedError

    def num_tokens(self, grid_or_length: Any) -> int:
        """Exact number of output tokens for an input grid (t, h, w) or number of valid tower tokens."""
        raise NotImplementedError

    def to_config(self) -> dict[str, Any]:
        """A JSON-able dict from which ``build_connector`` makes the same architecture."""
        raise NotImplementedError


class Scorer:
    """Similarity of queries to a gallery, shared by retrieval, zero-shot and search; cosine unless overridden."""

    def score(self, query: Any, gallery: Any) -> Tensor:
        """query [Q, D], gallery [G, D] -> [Q, G]."""
        q = torch.nn.functional.normalize(query, dim=-1)
        return q @ torch.nn.functional.normalize(gallery, dim=-1).T


class Transform:
    """Record -> record, or tensors -> tensors with their boxes, before the towers; random draws come from ``rng``.

    Attributes:
        field: what it changes: ``image`` (with ``boxes``), ``audio`` or ``text``; empty: several of them.
        name: what a config calls it.
    """

    field: str = ""
    name: str = ""

    def __call__(self, item: dict[str, Any], rng: Any) -> dict[str, Any]:
        raise NotImplementedError


class BatchSampler:
    """Which items make up batch number ``step``: a pure function of the seed and the step, so resume needs no state."""

    def indices(self, step: int) -> list[int]:
        raise NotImplementedError


class DataRecipe:
    """Records -> records, offline."""

    def apply(self, records: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        raise NotImplementedError


class StepHook:
    """Actions around one training step."""

    def before_forward(self, model: nn.Module, batch: Any, step: int) -> None: ...

    def after_loss(self, model: nn.Module, batch: Any, losses: dict[str, Tensor], step: int) -> None: ...

    def after_backward(self, model: nn.Module, step: int) -> None: ...

    def before_optimizer_step(self, model: nn.Module, step: int) -> None: ...


class Task:
    """One evaluation: records, a prompt, a parser and a metric with its interval."""

    name: str = ""

    def samples(self) -> Sequence[dict[str, Any]]:
        raise NotImplementedError

    def prompt(self, sample: dict[str, Any]) -> list[dict[str, Any]]:
        """Chat messages for one sample."""
        raise NotImplementedError

    def parse(self, answer: str) -> Any:
        raise NotImplementedError

    def aggregate(self, rows: Sequence[dict[str, Any]]) -> list[Any]:
        """Figures from rows that hold the sample, the raw and the parsed answer."""
        raise NotImplementedError
