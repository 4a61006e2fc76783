"""What trains in a phase: its parameter groups, what begins anew, teachers, and a loss's own start."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mmllm.align.config import PhaseConfig
from mmllm.errors import UserError, unknown
from mmllm.train.align_config import AlignConfig

if TYPE_CHECKING:
    from mmllm.align.model import AlignModel
    from mmllm.align.step import AlignStep
    from mmllm.train.align_objectives import PhaseParts


Group = tuple[str, list[Any], float | None]  # name, parameters, learning rate (None: the section's)


def groups(config: AlignConfig, model: AlignModel, phase: PhaseConfig, step: AlignStep) -> list[Group]:
    """What trains in a phase, as parameter groups.

    Raises:
        UserError: a part that does not exist, or nothing to train.
    """
    parts = model.parts()
    used_parts = {p for streams in step.want.values() for s, kinds in streams.items() for p in uses(model, s, kinds)}
    wanted: list[str] = []
    for name in phase.trains:
        found = [name] if name in parts else [p for p in parts if p.split(".")[0] == name and p in used_parts]
        if not found or ("." in name and name not in parts):
            raise unknown("part", name, parts, f"phase '{phase.name}', trains")
        wanted += found
    for name in phase.learning_rates:
        if name not in parts:
            raise unknown("part", name, parts, f"phase '{phase.name}', learning_rates")
    base = float(phase.train.get("learning_rate", config.train.learning_rate))
    made: list[Group] = []
    for name in dict.fromkeys(wanted):
        may = getattr(parts[name], "trainable", parts[name].parameters)
        made.append((name, list(may()), phase.learning_rates.get(name)))
        if name.endswith(".tower") and not made[-1][1]:
            do = f"leave {name} out, or let its tower's 'train' be full, last_n or lora"
            raise UserError(f"'{name}' is frozen by its own 'train: none'", f"phase '{phase.name}', trains", do)
    used = {p for o in step.objectives for p in pair_names(o) if p in model.logit_scale}
    scales = [model.logit_scale[p] for p in sorted(used)]
    biased = {p for o in step.objectives if hasattr(o, "initial_bias") for p in pair_names(o)}
    scales += [model.logit_bias[p] for p in sorted(biased)]
    made.append(("logit_scale", scales, None))
    objectives: list[Any] = list(step.objectives)
    for i, o in enumerate(objectives):
        own = [p for p in o.parameters() if p.requires_grad]
        made.append((step.terms[i].name, own, base * o.lr_multiplier))
    model.active = set(wanted)
    return [g for g in once(made) if g[1]]


def once(made: list[Group]) -> list[Group]:
    """The groups with each parameter in the first that has it: parts may share some (a codebook)."""
    seen: set[int] = set()
    out: list[Group] = []
    for name, params, rate in made:
        fresh = [p for p in params if id(p) not in seen]
        seen |= {id(p) for p in fresh}
        out.append((name, fresh, rate))
    return out


def uses(model: AlignModel, stream: str, kinds: set[str]) -> set[str]:
    """The parts of the model that make these kinds of a stream."""
    base = model.base(stream)
    found = {f"{model.tower_of[base]}.tower"}
    for kind, part in (("embedding", "head"), ("token_embedding", "connector")):
        if kind in kinds:
            found.add(f"{model.owner(stream, part)}.{part}")
    return found


def check_reset(config: AlignConfig, model: AlignModel, phase: PhaseConfig) -> None:
    """Checks that the parts in ``reset`` can be made anew.

    Raises:
        UserError: a part that does not exist, or a tower, whose weights have a source of their own.
    """
    held = model.parts()
    where = f"phase '{phase.name}', reset"
    for part in phase.reset:
        name, _, kind = part.rpartition(".")
        if kind == "tower":
            do = "say in its stream where its weights come from"
            raise UserError("a tower cannot be reset", where, do)
        if part not in held:
            raise unknown("part", part, [p for p in held if not p.endswith(".tower")], where)
        if getattr(config.streams[name], kind) is None:
            raise UserError(f"'{part}' comes from init and cannot be made anew", where)


def reset(config: AlignConfig, model: AlignModel, phase: PhaseConfig) -> None:
    """Fresh weights for the parts that the phase does not take over from the last one.

    Raises:
        UserError: see ``check_reset``.
    """
    from mmllm.train.align_model import make_connector, make_head

    check_reset(config, model, phase)
    for part in phase.reset:
        name, _, kind = part.rpartition(".")
        stream = config.streams[name]
        owner = model.tower_of[model.base(name)]
        if kind == "head":
            model.heads[name] = make_head(model.towers[owner], model.embedding_dim, stream)
        else:
            towers = dict(model.towers.items())
            dim = model.embedding_dim
            model.connectors[name] = make_connector(config, towers, owner, dim, stream)


def teachers(model: AlignModel, parts: PhaseParts) -> dict[str, Any]:
    """A teacher for each stream that asks for one, with copies of what trains of it."""
    from mmllm.blocks.ema import Teacher

    made = {}
    for name, spec in parts.derived.items():
        if spec.ema is not None:
            want = set().union(*(streams.get(name, set()) for streams in parts.want.values()))
            base = model.base(name)
            names = {"tower": model.tower_of[base]}
            names |= {k: model.owner(name, k) for k in model.modules_of(name, want) if k != "tower"}
            trained = {k: m for k, m in model.modules_of(name, want).items() if f"{names[k]}.{k}" in model.active}
            made[name] = Teacher(trained, spec.ema.momentum, spec.ema.end)
    return made


def own_start(model: AlignModel, objectives: list[Any]) -> None:
    """Temperature and bias where a loss has its own start (SigLIP), the first time that a pair is trained."""
    import torch

    for objective in objectives:
        if hasattr(objective, "initial_bias") and objective.pair_name not in model.started:
            with torch.no_grad():
                model.logit_scale[objective.pair_name].fill_(objective.initial_scale)
                model.logit_bias[objective.pair_name].fill_(objective.initial_bias)
            model.started.add(objective.pair_name)


def pair_names(objective: Any) -> list[str]:
    """The pairs whose ``logit_scale`` an objective uses."""
    one = [objective.pair_name] if hasattr(objective, "pair_name") else []
    return one + list(getattr(objective, "pair_names", ()))
