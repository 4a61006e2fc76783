"""Turns a phase of an align config into objectives and derived streams, and checks them before data are read."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mmllm.align.config import PhaseConfig, StreamConfig, check_derived
from mmllm.errors import UserError, unknown
from mmllm.train.align_config import AlignConfig

if TYPE_CHECKING:
    from mmllm.align.model import AlignModel
    from mmllm.align.step import Term
    from mmllm.contracts import Objective


@dataclass
class PhaseParts:
    """What a phase trains by.

    Attributes:
        want: source -> stream -> what is needed of it.
        derived: the derived streams that the phase uses: the config's, and those that objectives bring along.
    """

    objectives: list[Objective] = field(default_factory=list)
    terms: list[Term] = field(default_factory=list)
    want: dict[str, dict[str, set[str]]] = field(default_factory=dict)
    derived: dict[str, StreamConfig] = field(default_factory=dict)


def phase_parts(config: AlignConfig, phase: PhaseConfig, model: AlignModel) -> PhaseParts:
    """The phase's objectives, ready for this model, and what they need.

    Raises:
        UserError: an unknown objective or option, or one that the streams, towers or chunks of this phase do not fit.
    """
    from mmllm.align.needs import needed

    parts = PhaseParts(derived={n: s for n, s in config.streams.items() if s.of is not None})
    parts.objectives, parts.terms = make_objectives(config, phase, model)
    for objective, term in zip(parts.objectives, parts.terms):
        for name, spec in objective.streams.items():
            if name not in parts.derived:
                parts.derived[name] = _brought(config, name, spec, term.name)
        if phase.chunk_size is not None and not objective.two_pass:
            do = "leave chunk_size out of this phase"
            raise UserError(f"objective '{term.name}' does not work in chunks", f"phase '{phase.name}'", do)
    model.of = {n: str(s.of) for n, s in parts.derived.items()}
    feeds = {s: c.streams for s, c in phase.sources.items()}
    parts.want = needed(parts.objectives, parts.terms, feeds, model, parts.derived)
    used = {s for streams in parts.want.values() for s in streams}
    parts.derived = {n: s for n, s in parts.derived.items() if n in used}
    for objective in parts.objectives:
        objective.setup(model)
    return parts


def make_objectives(config: AlignConfig, phase: PhaseConfig, model: AlignModel) -> tuple[list[Any], list[Any]]:
    """The phase's objectives and their terms.

    Raises:
        UserError: unknown objective or option.
    """
    import mmllm.align.objectives
    import mmllm.align.qformer_stage
    import mmllm.align.region_box
    import mmllm.align.region_side  # noqa: F401  (all register the core objectives)
    from mmllm.align.step import Term
    from mmllm.registry import get, make

    made, terms = [], []
    for spec in phase.objectives:
        cls = get("objective", spec.type, f"phase '{phase.name}'")
        options = dict(spec.options)
        for key in ("dim", "words"):  # of the LLM's word embeddings
            wanted = inspect.signature(cls).parameters.get(key)
            if wanted is not None and wanted.default is inspect.Parameter.empty and key not in options:
                if config.words is None:
                    do = "name the stream of the LLM's word embeddings"
                    raise UserError(f"objective '{spec.type}' needs 'words'", f"phase '{phase.name}'", do)
                options[key] = config.words if key == "words" else model.tower(config.words).hidden_size
        made.append(make("objective", {"type": spec.type, **options}, f"phase '{phase.name}'"))
        name = f"{spec.type}:{':'.join(options['pair'])}" if "pair" in options else spec.type
        name = f"{name}:{options['stream']}" if "stream" in options else name
        terms.append(Term(name, spec.weight, tuple(spec.sources or phase.sources)))
    return made, terms


def _brought(config: AlignConfig, name: str, spec: dict[str, Any], objective: str) -> StreamConfig:
    """The config of a stream that an objective brings along."""
    stream = StreamConfig.model_validate(spec)
    base = config.streams.get(str(stream.of))
    if base is None:
        raise unknown("stream", str(stream.of), config.streams, f"objective '{objective}'")
    check_derived(name, stream, base)
    return stream
