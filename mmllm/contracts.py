"""The types that the rooms meet in: features, batches, and the small base classes that methods plug into."""

from __future__ import annotations

import copy
import math
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
    """One named stream of a batch (``image``, ``text``, ``image@strong``, ``image@ema``): features and projections.

    A stream has one row per item, unless ``owner`` says otherwise: records may lack a modality (no row), or have
    several rows in it (captions).

    Attributes:
        features: what the tower gives, where an objective needs it (``image.tokens``, ``text.input_ids``).
        embedding: [B', P], unit norm, what a pooled head gives.
        token_embedding: [B', M, P], what a token-level head (a connector) gives; ``token_mask`` [B', M] bool.
        grid: (t, h, w) where the ``token_embedding`` of a connector lies on the tower's grid.
        owner: [B'] number, within the batch, of the item that each row belongs to; None: row i is item i.
        extras: what an input transform made beside the inputs, such as ``labels`` of masked words, [B', ...].
        boxes: of this view, where it moved them; else the batch's hold.
    """

    features: Features | None = None
    embedding: Tensor | None = None
    token_embedding: Tensor | None = None
    token_mask: Tensor | None = None
    grid: tuple[int, int, int] | None = None
    owner: Tensor | None = None
    extras: dict[str, Tensor] = field(default_factory=dict)
    boxes: list[list[dict[str, Any]]] | None = None


@dataclass
class AlignBatch:
    """What an objective sees: all streams of the batch, of all chunks and (see ``Objective.gathered``) all processes.

    Attributes:
        items: [B] numbers of the items in their source's data.
        label_ids: [B] int64, equal for equal labels; ``labels`` as text are those of this process.
        boxes: per item, a list of ``{"xyxy": [x0, y0, x1, y1] in 0..1, "text": str}``.
        logit_scale: pair name ("image:text") -> scalar, already exponentiated.
        logit_bias: pair name -> scalar.
        step: of the optimizer, from 0; ``progress`` is its share of the phase's steps, 0..1.
        ranks: the processes, for objectives that are not ``gathered``; None: the batch is whole.
        extras: what a source brings besides: its ``vocabulary``, fields of its records by name.
    """

    streams: dict[str, Stream]
    ids: list[str] = field(default_factory=list)
    labels: list[str] | None = None
    groups: list[str] | None = None
    languages: list[str | None] | None = None
    boxes: list[list[dict[str, Any]]] | None = None
    items: Tensor | None = None
    label_ids: Tensor | None = None
    logit_scale: dict[str, Tensor] = field(default_factory=dict)
    logit_bias: dict[str, Tensor] = field(default_factory=dict)
    step: int = 0
    progress: float = 0.0
    ranks: Any = None
    extras: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        """Number of items."""
        for known in (self.items, self.ids, self.labels):
            if known is not None and len(known):
                return len(known)
        for stream in self.streams.values():
            rows = stream.embedding if stream.embedding is not None else stream.token_embedding
            rows = stream.features.pooled if rows is None and stream.features is not None else rows
            if rows is not None and stream.owner is None:
                return len(rows)
        raise ValueError("a batch without ids needs a stream with one row per item")


class Objective(nn.Module):
    """A loss on an AlignBatch; may own parameters, buffers and queues, and other modules with an ``after_step``.

    Attributes (of the class, or set in ``__init__``):
        needs: what must be in the batch: ``image.embedding``, ``image.token_embedding``, ``image.tokens``,
            ``image.pooled``, ``image.grid``, ``text.input_ids``, ``image.layers[-2]``, ``text@mlm.labels``, ``boxes``,
            ``labels``, ``groups``, ``vocabulary``, ``meta.FIELD``.
        streams: streams that the objective brings along where the config does not define them, such as
            ``{"image@ema": {"of": "image", "ema": 0.996}}``.
        two_pass: True when the loss is right under the two-pass big-batch step, in which the streams are made in
            chunks and a second time for the gradient: it must reach the towers through the batch alone.
        gathered: True: sees the items of all processes, each process computing all of it; False: sees its own
            process's and ``batch.ranks``.
        lr_multiplier: factor on the learning rate of the objective's own parameters.
    """

    needs: frozenset[str] = frozenset()
    streams: dict[str, dict[str, Any]] = {}
    two_pass: bool = True
    gathered: bool = True
    lr_multiplier: float = 1.0

    def setup(self, model: nn.Module) -> None:
        """Called once before training, with the AlignModel: makes parameters whose size the towers decide."""

    def prepare(self, bank: Any) -> None:
        """Called once before a phase's first step, also of a resumed run, with the feature bank of the first source:
        makes buffers whose size the data decide (``len(bank.source.records)``)."""

    def forward(self, batch: AlignBatch) -> dict[str, Tensor]:
        """Returns ``{"loss": scalar or [B], "valid": [B] bool (optional), ...named terms for the log}``."""
        raise NotImplementedError

    def after_step(self, model: nn.Module) -> None:
        """Called after each optimizer step (EMA, queues)."""

    def on_epoch(self, bank: Any) -> None:
        """Called at the start of an epoch with the feature bank of the training set (``mmllm.align.bank``)."""


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

    @property
    def gives(self) -> frozenset[str]:
        """Which parts of Features it fills: what objectives may need."""
        more = {"input_ids"} if self.modality == "text" else set()
        if getattr(self, "grid", None) is not None:
            more.add("grid")
        return frozenset({"tokens", "mask", "pooled", "layers"} | more)

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

    def gradient_checkpointing_enable(self) -> None:
        """Lets the layers keep no activations in training, where the tower has layers that can.

        Raises:
            NotImplementedError: it has none.
        """
        encoder: Any = getattr(self, "encoder", None)
        if not hasattr(encoder, "checkpointing"):
            raise NotImplementedError
        encoder.checkpointing = True

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
    """Carries tower features into the LLM's embedding space.

    Attributes:
        takes_text: True when ``forward`` makes use of a text, and gives as many tokens whatever the input.
        text_parts: parts of the names of weights that serve the text alone; a trained connector that is changed so as
            to take no text leaves them behind.
    """

    takes_text: bool = False
    text_parts: tuple[str, ...] = ()

    def forward(self, features: Features, text: Features | None = None) -> tuple[Tensor, Tensor]:
        """Returns tokens [B, M, D_out] and mask [B, M] bool."""
        raise NotImplementedError

    def num_tokens(self, grid_or_length: Any) -> int:
        """Exact number of output tokens for an input grid (t, h, w) or number of valid tower tokens."""
        raise NotImplementedError

    def out_grid(self, grid: tuple[int, int, int] | None) -> tuple[int, int, int] | None:
        """The grid on which the output tokens of an input grid lie; None where they lie on none."""
        return grid if grid is not None and self.num_tokens(grid) == math.prod(grid) else None

    def to_config(self) -> dict[str, Any]:
        """A JSON-able dict from which ``build_connector`` makes the same architecture."""
        raise NotImplementedError


@dataclass
class InjectedMedia:
    """What the layers of an Injector see of a batch's media.

    Attributes:
        tokens: [B, N, H], all media of a row one after the other, padded.
        allowed: [B, L, N] bool, which of them each token of the row sees.
        injector: whose layers are to run; calls: how many decoder layers have asked so far.
    """

    tokens: Tensor
    allowed: Tensor
    injector: Any = None
    calls: int = 0


class Injector(nn.Module):
    """Adds layers inside the LLM through which media reach it; at the start it changes nothing, bit for bit.

    Attributes:
        attend: "last" or "all" media before a token are seen by it.
        in_place: True where media's tokens also stand in the text.
    """

    attend: str = "last"
    in_place: bool = False

    def forward(self, index: int, hidden: Tensor, media: InjectedMedia) -> Tensor:
        """Hidden states [B, L, H] before decoder layer ``index`` -> the same with the media mixed in."""
        raise NotImplementedError

    def to_config(self) -> dict[str, Any]:
        """A JSON-able dict from which ``build_injector`` makes the same layers."""
        raise NotImplementedError


class Scorer:
    """Similarity of queries to a gallery, shared by objectives, retrieval, zero-shot and search; cosine by itself.

    Attributes:
        needs: what it compares of a stream: ``embedding``, ``token_embedding``, ``tokens``.
        symmetric: True when score(a, b) is the transpose of score(b, a).
    """

    needs: frozenset[str] = frozenset({"embedding"})
    symmetric: bool = True

    def rows(self, stream: Stream) -> Any:
        """What is compared: a tensor [N, ...], or a tuple of tensors with N first."""
        assert stream.embedding is not None
        return stream.embedding

    def score(self, query: Any, gallery: Any) -> Tensor:
        """``rows`` of Q and of G items -> [Q, G]; a function of its arguments alone."""
        q = torch.nn.functional.normalize(query, dim=-1)
        return q @ torch.nn.functional.normalize(gallery, dim=-1).T


class Transform:
    """Record -> record with its boxes, before the preprocessor; random draws come from ``rng`` (numpy).

    Attributes:
        field: what it changes: ``image`` (with ``boxes``), ``audio`` or ``text``; empty: several of them.
        name: what a config calls it.
    """

    field: str = ""
    name: str = ""

    def __call__(self, item: dict[str, Any], rng: Any) -> dict[str, Any]:
        raise NotImplementedError


class InputTransform:
    """Tower inputs -> tower inputs, whole batches of a stream, between the preprocessor and the tower.

    Attributes:
        modality: whose inputs it changes.
        gives: the extras that it makes, which objectives may need (``text@mlm.labels``).
        name: what a config calls it.
    """

    modality: str = ""
    gives: frozenset[str] = frozenset()
    name: str = ""

    def setup(self, tower: Tower) -> None:
        """Called once with the stream's tower (its tokenizer, its patch size)."""

    def __call__(self, inputs: dict[str, Any], generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Tensors [B, ...] by name -> changed copies, and extras [B, ...] by name."""
        raise NotImplementedError


class BatchSampler:
    """Which items make up batch number ``step``: a pure function of the seed and the step, so resume needs no state."""

    def prepare(self, bank: Any) -> None:
        """Called once before a phase's first step, also of a resumed run, with the feature bank of its source.

        A sampler that goes by features must take those of streams that do not train in the phase: after a resume the
        others have other weights. Its keys are those of the bank's ``items``, in their order.
        """

    def indices(self, step: int) -> list[int]:
        raise NotImplementedError


class DataRecipe:
    """Records -> records, offline, before a source is screened; ``name`` is what a config calls it."""

    name: str = ""

    def apply(self, records: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        raise NotImplementedError


class StepHook:
    """Actions around one training step; one that is also an ``nn.Module`` has its buffers kept in checkpoints.

    Attributes:
        groups: name -> the parameters that train, set before the first step.
    """

    groups: dict[str, list[nn.Parameter]] = {}

    def before_forward(self, model: nn.Module, batch: Any, step: int) -> None:
        """Before the model sees a micro-batch."""

    def after_loss(self, model: nn.Module, batch: Any, losses: dict[str, Any], step: int) -> None:
        """Between loss and backward; may replace ``losses["loss"]``.

        ``losses["each"]`` (align): term -> (loss [B], valid [B] bool) of objectives that give a loss per item;
        ``losses["batches"]`` (align): source -> the AlignBatch that the objectives saw, embeddings with their graph.
        """

    def after_backward(self, model: nn.Module, step: int) -> None:
        """After the backward of a micro-batch."""

    def before_optimizer_step(self, model: nn.Module, step: int) -> None:
        """With the gradients of the whole step, clipped."""


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
