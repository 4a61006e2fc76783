"""What objectives need of each source's streams, checked against the towers and heads before any data are read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from mmllm.align.config import StreamConfig
from mmllm.align.model import AlignModel
from mmllm.align.step import Term
from mmllm.contracts import Objective
from mmllm.errors import UserError, unknown
from mmllm.registry import get

Want = dict[str, dict[str, set[str]]]
OF_BATCH = ("vocabulary", "boxes", "labels", "groups", "languages")


def needed(
    objectives: Sequence[Objective],
    terms: Sequence[Term],
    streams: Mapping[str, Sequence[str]],
    model: AlignModel,
    derived: Mapping[str, StreamConfig],
) -> Want:
    """What each source must give: source -> stream -> {"embedding", "tokens", "layers[-2]", ...}.

    Args:
        streams: source -> the streams that it feeds; what is derived from them comes by itself.
        model: whose towers and heads are asked.
        derived: the derived streams' configs.

    Raises:
        UserError: an objective needs a stream that its source does not feed, or something that the stream's tower,
            heads or transforms do not give; it names both.
    """
    want: Want = {s: {} for s in streams}
    for objective, term in zip(objectives, terms):
        for need in sorted(objective.needs):
            if need in OF_BATCH or need.startswith("meta."):
                continue
            stream, dot, what = need.partition(".")
            if not dot:
                raise unknown("need", need, OF_BATCH, f"objective '{term.name}'")
            base = derived[stream].of if stream in derived else stream
            for source in term.sources:
                if base not in streams[source]:
                    do = f"add {base} to its streams, or name other 'sources' for the objective"
                    raise UserError(f"objective '{term.name}' needs stream '{stream}'", f"source '{source}'", do)
                check_need(term.name, stream, what, model, derived)
                want[source].setdefault(stream, set()).add(what)
    return want


def check_need(objective: str, stream: str, what: str, model: AlignModel, derived: Mapping[str, StreamConfig]) -> None:
    """Raises UserError where a stream cannot give what an objective needs of it."""
    tower = model.tower(stream)
    where = f"objective '{objective}'"
    if what in ("embedding", "token_embedding"):
        try:
            model.owner(stream, "head" if what == "embedding" else "connector")
        except UserError as e:
            raise UserError(f"it needs '{stream}.{what}', and {e.what}", where, e.do) from None
        return
    if what in tower.gives or (re.fullmatch(r"layers\[-?\d+\]", what) and "layers" in tower.gives):
        return
    config = derived.get(stream)
    specs = config.input_transforms if config is not None else []
    extras: set[str] = set()
    for spec in specs:
        extras |= get("input_transform", spec if isinstance(spec, str) else str(spec.get("type")), where).gives
    if what in extras:
        return
    kind = type(tower).__name__
    has = ", ".join(sorted({"embedding", "token_embedding", *tower.gives, *extras}))
    what = f"it needs '{stream}.{what}', which neither the tower of '{stream}' ({kind}) nor its transforms give"
    raise UserError(what, where, f"choose another tower or objective; it has: {has}")
