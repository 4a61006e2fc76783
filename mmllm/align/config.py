"""The config of an align run: streams (a tower and its heads), phases (sources, objectives, what trains), measures."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from mmllm.config import StrictModel
from mmllm.data.open import DataSpec
from mmllm.errors import UserError, unknown

MODALITIES = ("vision", "audio", "text", "video")


class HeadConfig(StrictModel):
    """The projection to the shared space: LayerNorm?, dropout, hidden layer?, linear.

    Attributes:
        activation: after the hidden layer.
        identity: no projection at all, for a tower whose pooled output is trained to be the embedding (SigLIP).
    """

    hidden_dim: int | None = None
    dropout: float = Field(default=0.0, ge=0, lt=1)
    norm: bool = False
    bias: bool = True
    activation: Literal["gelu", "relu"] = "gelu"
    identity: bool = False

    @model_validator(mode="after")
    def _nothing_beside_identity(self) -> HeadConfig:
        if self.identity and (self.hidden_dim or self.dropout or self.norm):
            raise UserError("an identity head has no layers", do="leave hidden_dim, dropout and norm out, or identity")
        return self


Captions = Literal["random", "first", "round_robin", "all"]
Augment = Literal["none", "cutout", "scene", "sound"]


class EmaConfig(StrictModel):
    """A teacher: weights that follow those that train, ``w' <- m w' + (1 - m) w`` after every step.

    Attributes:
        momentum: m; ``end``, where given, is its value in the last step, reached along a cosine (BYOL, 2006.07733).
    """

    momentum: float = Field(default=0.996, ge=0, le=1)
    end: float | None = Field(default=None, ge=0, le=1)


class StreamConfig(StrictModel):
    """One stream: which tower reads it and what is put on top.

    A stream named ``BASE@NAME`` is derived from another, given as ``of: BASE``: the same items through the same tower
    and, unless it has its own, the same head and connector, but seen in another way.

    Attributes:
        modality: ``vision``, ``audio``, ``text`` or ``video``; that of its base for a derived stream.
        tower: folder, hub id, ``starter:NAME``, ``tiny:vit``, ``tiny:text``, ``timm:NAME`` or a dict (see
            ``load_tower``), which may say with ``train`` which of its weights a phase that trains it changes.
        tower_of: another stream whose tower this one shares, instead of ``tower``.
        head: pooled projection into the shared space; None: this stream has none.
        connector: config of a token-level head (see ``build_connector``); ``in_dim`` and ``out_dim`` may be left out.
        image_size: side that pictures are resized to, where a tower allows several.
        transforms: of a derived stream, in place of its source's: another crop, another loudness.
        input_transforms: of a derived stream's tower inputs, such as ``{"type": "mask_tokens", "p": 0.15}``.
        ema: a teacher's copy of tower, head and connector reads it, without gradient.
        captions: of a derived text stream, in place of its source's.
        cache: False runs the frozen tower on every batch, instead of keeping its features.
    """

    modality: Literal["vision", "audio", "text", "video"] | None = None
    tower: str | dict[str, Any] | None = None
    tower_of: str | None = None
    of: str | None = None
    head: HeadConfig | None = None
    connector: dict[str, Any] | None = None
    image_size: int | None = Field(default=None, ge=8)
    transforms: list[str | dict[str, Any]] = Field(default_factory=list)
    input_transforms: list[str | dict[str, Any]] = Field(default_factory=list)
    ema: EmaConfig | None = None
    captions: Captions | int | None = None
    cache: bool = True

    @model_validator(mode="before")
    @classmethod
    def _momentum_alone(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("ema"), int | float) and not isinstance(data["ema"], bool):
            return {**data, "ema": {"momentum": data["ema"]}}
        return data

    @model_validator(mode="after")
    def _one_tower(self) -> StreamConfig:
        given = [x for x in ("tower", "tower_of", "of") if getattr(self, x) is not None]
        if len(given) > 1:
            raise UserError(f"a stream has either {' or '.join(map(repr, given))}")
        if self.of is None:
            for name in ("transforms", "input_transforms", "ema", "captions"):
                if getattr(self, name):
                    do = "name its stream by 'of', or give the source's transforms and captions"
                    raise UserError(f"'{name}' is for a stream that is derived from another", do=do)
            if self.modality is None:
                raise UserError("a stream needs its 'modality'", do=f"one of {', '.join(MODALITIES)}")
        return self


Data = str | DataSpec | list[str | DataSpec]


class SamplerConfig(StrictModel):
    """Which items make up a batch: ``type`` from the registry (see ``mmllm.data.samplers``), and its ``options``.

    Attributes:
        by: what the sampler goes by: ``label``, ``group``, ``id`` or ``meta.FIELD`` of the records.
    """

    type: str
    by: str = "label"
    options: dict[str, Any] = Field(default_factory=dict)


class SourceConfig(StrictModel):
    """Where a phase's items come from.

    Attributes:
        data: a records file, relative to ``dataset``, or anything that ``open_records`` reads; several may be given.
        streams: the streams that this source feeds.
        batch_size: items per step; None: the train section's ``per_device_train_batch_size``.
        recipes: names, or ``{"type", ...options}``, of what makes this source's records out of those of its data.
        optional: streams that a record may lack, as long as it has two of the source's streams.
        sampler: ``distinct`` draws different labels and one item of each; ``random`` draws items; ``shuffle`` goes
            through the data epoch by epoch; see ``SamplerConfig`` for the others.
        captions: which of an item's texts a batch takes: ``random``, ``first``, ``round_robin`` (pass by pass over the
            data), ``all``, or a number of them at random: then the text stream has several rows for an item.
        languages: of texts given by language only these.
        transforms: names, or ``{"type", ...options}``, of what changes media and texts before towers that train.
        copies: augmented copies of each item's features beside the plain one, for frozen towers.
        augment: ``cutout`` (cut-outs on a canvas), ``scene`` (colours only), ``sound`` (log-mel) or ``none``; or a
            list of one for pictures and one for sounds.
        image_size: overrides the stream's.
        frames: of each video, evenly spaced.
        text_noise: length of the random vector added to a frozen text feature, as a share of its own length.
    """

    data: Data
    streams: list[str]
    recipes: list[str | dict[str, Any]] = Field(default_factory=list)
    optional: list[str] = Field(default_factory=list)
    batch_size: int | None = Field(default=None, ge=1)
    sampler: str | SamplerConfig = "random"
    captions: Captions | int = "random"
    languages: list[str] | None = None
    transforms: list[str | dict[str, Any]] = Field(default_factory=list)
    copies: int = Field(default=0, ge=0)
    augment: Augment | list[Augment] = "none"
    image_size: int | None = Field(default=None, ge=8)
    frames: int = Field(default=8, ge=1)
    text_noise: float = Field(default=0.0, ge=0)

    def augment_of(self, modality: str) -> Augment:
        """How the media of a modality are augmented."""
        fit: dict[str, tuple[Augment, ...]] = {"vision": ("cutout", "scene"), "audio": ("sound",)}
        for choice in self.augment if isinstance(self.augment, list) else [self.augment]:
            if choice in fit.get(modality, ()):
                return choice
        return "none"


class WeightConfig(StrictModel):
    """A weight that changes during a phase: ``start`` until ``begin``, ``end`` from ``until`` on, between them a ramp.

    Attributes:
        begin, until: steps, or shares of the phase where at most 1 (1 is the whole phase).
    """

    start: float
    end: float
    begin: float = Field(default=0.0, ge=0)
    until: float = Field(default=1.0, gt=0)
    shape: Literal["linear", "cosine", "step"] = "linear"

    def at(self, step: int, total: int) -> float:
        """The weight in a step (from 0) of ``total``."""
        begin, until = (x * total if x <= 1 else x for x in (self.begin, self.until))
        done = min(1.0, max(0.0, (step - begin) / max(until - begin, 1e-9)))
        if self.shape == "step":
            done = float(step >= until)
        elif self.shape == "cosine":
            done = 0.5 - 0.5 * math.cos(math.pi * done)
        return self.start + done * (self.end - self.start)


class ObjectiveConfig(StrictModel):
    """One term of the loss: ``type`` from the registry, ``weight``, ``options``, and the sources it looks at."""

    type: str
    weight: float | WeightConfig = 1.0
    sources: list[str] | None = None
    options: dict[str, Any] = Field(default_factory=dict)


class PhaseConfig(StrictModel):
    """A part of the run with its own data, loss and trainable parts.

    Attributes:
        name: the key under ``phases``.
        trains: such as ``image.head``, ``audio.tower``, ``image.connector``; a bare stream means all its parts that
            the phase's objectives use.
            Logit scales and the objectives' own parameters train where an objective uses them.
        reset: parts that begin this phase with fresh weights instead of the last phase's.
        learning_rates: part -> rate, for parts that differ from ``train.learning_rate``.
        chunk_size: items that go through the towers at a time; the loss still sees the whole batch, and the gradients
            are exactly its own (two passes, GradCache, arXiv 2101.06983). ``auto``: as many as fit in memory.
        hooks: names, or ``{"type", ...options}``, of step hooks.
        train: values that win over the run's ``train`` section, such as ``max_steps``.
    """

    name: str = ""
    sources: dict[str, SourceConfig]
    objectives: list[ObjectiveConfig]
    trains: list[str]
    reset: list[str] = Field(default_factory=list)
    learning_rates: dict[str, float] = Field(default_factory=dict)
    chunk_size: Annotated[int, Field(ge=1)] | Literal["auto"] | None = None
    hooks: list[str | dict[str, Any]] = Field(default_factory=list)
    train: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _optional_streams_are_read(self) -> PhaseConfig:
        for name, source in self.sources.items():
            for stream in source.optional:
                if stream not in source.streams:
                    raise unknown("stream", stream, source.streams, f"phase '{self.name}', source '{name}', optional")
        return self


class MeasureConfig(StrictModel):
    """One measurement at the end.

    Attributes:
        name: the key under ``measures`` and the name of the figures, such as ``retrieval_new_concept``.
        kind: retrieval (names as gallery), zero_shot (classes from ``meta.FIELD``), regions (word at the cell), pairs
            (retrieval of items between every two of the streams, each text an item), geometry (gap, alignment,
            uniformity, CKA and effective rank of every two streams), probe (k-NN and linear, classes from ``FIELD``),
            or another that is registered.
        options: of that kind.
        data: records file or files, relative to ``dataset``.
        streams: query and text stream (for regions the picture stream and the words stream).
        field: of ``meta`` (or of the record itself), for zero_shot and probe.
        templates: of zero_shot's prompts; ``{}`` is the class.
        train: records of the training part, for probe.
        recipes: as in SourceConfig; also of ``train``.
        by: of pairs, what belongs together: the rows of one record, or of all records with one label.
        frames: of each video.
        scorer: what says how alike two items are, for pairs; see ``mmllm.align.scorers``.
        every: steps between two measurements during training, for the curves of the report; None: at the end alone.
        times_chance: figure, without the measure's name (``image_to_text_r1``) -> how many times chance is its target.
    """

    name: str = ""
    kind: str
    data: str | list[str]
    streams: list[str]
    options: dict[str, Any] = Field(default_factory=dict)
    field: str = "subgroup"
    templates: list[str] = ["a kind of {}"]
    train: str | list[str] | None = None
    recipes: list[str | dict[str, Any]] = Field(default_factory=list)
    by: Literal["item", "label"] = "item"
    image_size: int | None = None
    frames: int = Field(default=8, ge=1)
    scorer: str | dict[str, Any] = "cosine"
    times_chance: dict[str, float] = Field(default_factory=dict)
    every: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _has_what_it_needs(self) -> MeasureConfig:
        least = 2 if self.kind in ("retrieval", "zero_shot", "regions", "pairs", "geometry") else 1
        if len(self.streams) < least:
            raise UserError(f"measure '{self.name}' needs {least} streams", "streams")
        if self.kind == "probe" and self.train is None:
            raise UserError(f"measure '{self.name}' needs 'train'", do="name the records that the probe is fitted to")
        return self


class DataConfig(StrictModel):
    """What is done with items that cannot be used, and how media are read.

    Attributes:
        max_rejected: the largest share of a source's items that is left out; more stop the run.
        long_text: texts longer than their tower takes are left out (``skip``) or cut by its tokenizer (``cut``).
        workers: threads that decode; None: what suits the machine.
    """

    max_rejected: float = Field(default=0.01, ge=0, le=1)
    long_text: Literal["skip", "cut"] = "skip"
    workers: int | None = Field(default=None, ge=1)


class FeatureConfig(StrictModel):
    """How frozen towers run: dtype ``auto`` takes bfloat16 where the processor is fast at it.

    Attributes:
        batch_size: items per forward; None: 32, and of pictures on a CPU as many as keep a layer's output in its cache.
    """

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    batch_size: int | None = Field(default=None, ge=1)


def check_streams(streams: dict[str, StreamConfig], names: list[str], where: str) -> None:
    """Raises UserError with the nearest name when one of ``names`` is not a stream."""
    for name in names:
        if name not in streams:
            raise unknown("stream", name, streams, where)


def check_derived(name: str, stream: StreamConfig, base: StreamConfig) -> None:
    """Checks a derived stream ``BASE@NAME`` and gives it its base's modality.

    Raises:
        UserError: a name that does not show its base, a base that is derived itself, or another modality.
    """
    where = f"streams.{name}"
    if not name.startswith(f"{stream.of}@"):
        raise UserError(f"a stream derived from '{stream.of}' is named '{stream.of}@SOMETHING'", where)
    if base.of is not None:
        raise UserError(f"'{stream.of}' is derived itself", where, f"derive it from '{base.of}'")
    if stream.modality not in (None, base.modality):
        raise UserError(f"modality '{stream.modality}', and that of '{stream.of}' is '{base.modality}'", where)
    stream.modality = base.modality
