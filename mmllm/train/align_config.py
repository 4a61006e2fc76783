"""The config of ``mmllm align``: streams, phases and measures, and the checks that they fit together."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from mmllm.align.config import (
    DataConfig,
    FeatureConfig,
    MeasureConfig,
    PhaseConfig,
    StreamConfig,
    check_derived,
    check_streams,
)
from mmllm.config import StrictModel
from mmllm.errors import UserError, unknown
from mmllm.train.section import TrainSection


class AlignConfig(StrictModel):
    """``mmllm align``'s config; ``dataset`` is ``starter:full``, ``starter:fast`` or a folder.

    Attributes:
        init: an aligned model to begin with: the folder of an align run, a CLIP, SigLIP or CLAP model (folder or hub
            id) or an open_clip checkpoint (``{"model", "config", "tokenizer"}``). Streams of its names need no tower,
            and take its heads unless they define one.
        dtype: of matrix products in training (autocast); auto measures which is faster here.
        words: the stream of the LLM's word embeddings, which ``region_align`` aims at and connectors lead to.
    """

    dataset: str = "."
    init: str | dict[str, Any] | None = None
    embedding_dim: int = Field(default=256, ge=1)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    streams: dict[str, StreamConfig]
    words: str | None = None
    data: DataConfig = Field(default_factory=DataConfig)
    features: FeatureConfig = Field(default_factory=FeatureConfig)
    train: TrainSection = Field(default_factory=TrainSection)
    phases: dict[str, PhaseConfig]
    measures: dict[str, MeasureConfig] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _keys_are_names(cls, data: Any) -> Any:
        """Phases and measures are mappings, so that an override can reach them; each also knows its name."""
        if not isinstance(data, dict):
            return data
        out = dict(data)
        for key in ("phases", "measures"):
            if isinstance(out.get(key), dict):
                out[key] = {k: {**v, "name": k} if isinstance(v, dict) else v for k, v in out[key].items()}
        return out

    @model_validator(mode="after")
    def _names_fit(self) -> AlignConfig:
        for name, stream in self.streams.items():
            if stream.tower_of is not None:
                where = f"streams.{name}.tower_of"
                check_streams(self.streams, [stream.tower_of], where)
                theirs = self.streams[stream.tower_of].modality
                if stream.modality != theirs:
                    what = f"'{name}' is {stream.modality}, and the tower of '{stream.tower_of}' reads {theirs}"
                    raise UserError(what, where, "give the stream a tower of its own")
            if stream.of is not None:
                check_streams(self.streams, [stream.of], f"streams.{name}.of")
                check_derived(name, stream, self.streams[stream.of])
            elif stream.tower is None and stream.tower_of is None and self.init is None:
                raise UserError("a stream needs 'tower', 'tower_of' or 'of'", f"streams.{name}")
        if self.words is not None:
            check_streams(self.streams, [self.words], "words")
        for phase in self.phases.values():
            where = f"phase '{phase.name}'"
            for source, spec in phase.sources.items():
                check_streams(self.streams, spec.streams, f"{where}, source '{source}'")
            for objective in phase.objectives:
                for source in objective.sources or []:
                    if source not in phase.sources:
                        raise unknown("source", source, phase.sources, where)
            check_streams(self.streams, [p.split(".")[0] for p in phase.trains], f"{where}, trains")
        for measure in self.measures.values():
            check_streams(self.streams, measure.streams, f"measure '{measure.name}'")
        return self
