"""The config of an align run: streams (a tower and its heads), phases (sources, objectives, what trains), measures."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from mmllm.config import StrictModel
from mmllm.data.open import DataSpec
from mmllm.errors import UserError, unknown

MODALITIES = ("vision", "audio", "text")


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


class StreamConfig(StrictModel):
    """One stream: which tower reads it and what is put on top.

    Attributes:
        tower: folder, hub id, ``starter:NAME``, ``tiny:vit``, ``tiny:text``, ``timm:NAME`` or a dict (see
            ``load_tower``), which may say with ``train`` which of its weights a phase that trains it changes.
        tower_of: another stream whose tower this one shares, instead of ``tower``.
        head: pooled projection into the shared space; None: this stream has none.
        connector: config of a token-level head (see ``build_connector``); ``in_dim`` and ``out_dim`` may be left out.
        image_size: side that pictures are resized to, where a tower allows several.
    """

    modality: Literal["vision", "audio", "text"]
    tower: str | dict[str, Any] | None = None
    tower_of: str | None = None
    head: HeadConfig | None = None
    connector: dict[str, Any] | None = None
    image_size: int | None = Field(default=None, ge=8)

    @model_validator(mode="after")
    def _one_tower(self) -> StreamConfig:
        if (self.tower is None) == (self.tower_of is None):
            raise UserError("a stream needs either 'tower' or 'tower_of'")
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
        sampler: ``distinct`` draws different labels and one item of each; ``random`` draws items; ``shuffle`` goes
            through the data epoch by epoch; see ``SamplerConfig`` for the others.
        captions: which of an item's texts a batch takes: ``random``, ``first``, ``round_robin`` (pass by pass over the
            data), or ``all``: then an item has a row for each.
        languages: of texts given by language only these.
        transforms: names, or ``{"type", ...options}``, of what changes media and texts before towers that train.
        copies: augmented copies of each item's features beside the plain one, for frozen towers.
        augment: ``cutout`` (cut-outs on a canvas), ``scene`` (colours only), ``sound`` (log-mel) or ``none``.
        image_size: overrides the stream's.
        text_noise: length of the random vector added to a frozen text feature, as a share of its own length.
    """

    data: Data
    streams: list[str]
    batch_size: int | None = Field(default=None, ge=1)
    sampler: str | SamplerConfig = "random"
    captions: Literal["random", "first", "round_robin", "all"] = "random"
    languages: list[str] | None = None
    transforms: list[str | dict[str, Any]] = Field(default_factory=list)
    copies: int = Field(default=0, ge=0)
    augment: Literal["none", "cutout", "scene", "sound"] = "none"
    image_size: int | None = Field(default=None, ge=8)
    text_noise: float = Field(default=0.0, ge=0)


class ObjectiveConfig(StrictModel):
    """One term of the loss: ``type`` from the registry, ``weight``, ``options``, and the sources it looks at."""

    type: str
    weight: float = 1.0
    sources: list[str] | None = None
    options: dict[str, Any] = Field(default_factory=dict)


class PhaseConfig(StrictModel):
    """A part of the run with its own data, loss and trainable parts.

    Attributes:
        name: the key under ``phases``.
        trains: such as ``image.head``, ``audio.tower``, ``image.connector``; a bare stream means all its parts that
            the phase's objectives use.
            Logit scales and the objectives' own parameters train where an objective uses them.
        learning_rates: part -> rate, for parts that differ from ``train.learning_rate``.
        train: values that win over the run's ``train`` section, such as ``max_steps``.
    """

    name: str = ""
    sources: dict[str, SourceConfig]
    objectives: list[ObjectiveConfig]
    trains: list[str]
    learning_rates: dict[str, float] = Field(default_factory=dict)
    train: dict[str, Any] = Field(default_factory=dict)


class MeasureConfig(StrictModel):
    """One measurement at the end.

    Attributes:
        name: the key under ``measures`` and the name of the figures, such as ``retrieval_new_concept``.
        kind: retrieval (names as gallery), zero_shot (classes from ``meta.FIELD``), regions (word at the cell), pairs
            (retrieval of items between every two of the streams, each text an item), geometry (gap, alignment,
            uniformity, CKA and effective rank of every two streams), probe (k-NN and linear, classes from ``FIELD``).
        data: records file or files, relative to ``dataset``.
        streams: query and text stream (for regions the picture stream and the words stream).
        field: of ``meta`` (or of the record itself), for zero_shot and probe.
        templates: of zero_shot's prompts; ``{}`` is the class.
        train: records of the training part, for probe.
    """

    name: str = ""
    kind: Literal["retrieval", "zero_shot", "regions", "pairs", "geometry", "probe"]
    data: str | list[str]
    streams: list[str]
    field: str = "subgroup"
    templates: list[str] = ["a kind of {}"]
    train: str | list[str] | None = None
    image_size: int | None = None

    @model_validator(mode="after")
    def _has_what_it_needs(self) -> MeasureConfig:
        least = 1 if self.kind == "probe" else 2
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
