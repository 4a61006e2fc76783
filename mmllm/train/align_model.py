"""Makes the AlignModel of an align config: from its streams alone, or beginning with a model that is aligned."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmllm.align.config import StreamConfig, check_streams
from mmllm.errors import UserError
from mmllm.train.align_config import AlignConfig

if TYPE_CHECKING:
    from mmllm.align.model import AlignModel


def make_model(config: AlignConfig, offline: bool = False) -> AlignModel:
    """The model in eval mode, with fresh heads and connectors where ``init`` brings none.

    Raises:
        UserError: a tower or an initial model that cannot be loaded, or one without a stream that needs it.
    """
    from mmllm.align.model import AlignModel

    init = initial_model(config, offline)
    plain = {n: s for n, s in config.streams.items() if s.of is None}
    towers: dict[str, Any] = {}
    tower_of: dict[str, str] = {}
    for name, stream in plain.items():
        if stream.tower is not None:
            towers[name] = load_stream_tower(config, name, offline)
            if stream.image_size and hasattr(towers[name], "image_size"):
                towers[name].image_size = stream.image_size
        elif stream.tower_of is None:
            towers[name] = _from(init, name, stream)
        tower_of[name] = stream.tower_of or name
    dim = config.embedding_dim
    if init is not None and "embedding_dim" not in config.model_fields_set:
        dim = init.embedding_dim
    heads, connectors = {}, {}
    for name, stream in config.streams.items():
        owner = tower_of[stream.of or name]
        if stream.head is not None:
            heads[name] = make_head(towers[owner], dim, stream)
        elif init is not None and stream.of is None and name in init.heads:
            heads[name] = init.heads[name]
        if stream.connector is not None:
            connectors[name] = make_connector(config, towers, owner, dim, stream)
        elif init is not None and stream.of is None and name in init.connectors:
            connectors[name] = init.connectors[name]
    model = AlignModel(towers, tower_of, heads, connectors, pairs_of(config), dim)
    model.image_size = {n: s.image_size for n, s in plain.items() if s.image_size}
    model.of = {n: s.of for n, s in config.streams.items() if s.of is not None}
    if init is not None:
        _take_scales(model, init)
        model.image_size = {n: s for n, s in init.image_size.items() if n in plain} | model.image_size
    return model.eval()


def make_head(tower: Any, dim: int, stream: StreamConfig) -> Any:
    """A fresh pooled head for a stream of a tower."""
    from mmllm.align.model import ProjectionHead

    assert stream.head is not None
    return ProjectionHead(tower.pooled_size, dim, stream.head)


def make_connector(config: AlignConfig, towers: dict[str, Any], owner: str, dim: int, stream: StreamConfig) -> Any:
    """A fresh connector on the tower ``owner``: into the LLM's space, or without ``words`` into the shared one."""
    from mmllm.connectors import build_connector

    out_dim = towers[config.words].hidden_size if config.words else dim
    spec = {"in_dim": towers[owner].hidden_size, "out_dim": out_dim, **(stream.connector or {})}
    grid = getattr(towers[owner], "grid", None)
    if spec.get("positions") and not spec.get("grid") and grid is not None:
        spec["grid"] = list(grid[1:])
    return build_connector(spec)


def load_stream_tower(config: AlignConfig, name: str, offline: bool = False) -> Any:
    """The tower of a stream that has one of its own."""
    from mmllm.data.models import resolve_model
    from mmllm.towers import load_tower

    stream = config.streams[name]
    spec = {"model": stream.tower} if isinstance(stream.tower, str) else dict(stream.tower or {})
    spec["model"] = resolve_model(str(spec.get("model", "")), offline=offline)
    return load_tower(spec, str(stream.modality))


def initial_model(config: AlignConfig, offline: bool = False) -> AlignModel | None:
    """What ``init`` names; None without one."""
    from mmllm.align.folder import FILE, load_align
    from mmllm.align.interop import import_align
    from mmllm.align.open_clip import WEIGHTS, import_open_clip
    from mmllm.data.models import resolve_model

    if config.init is None:
        return None
    spec = {"model": config.init} if isinstance(config.init, str) else dict(config.init)
    path = Path(str(spec["model"])).expanduser()
    if any((folder / FILE).is_file() for folder in (path, path / "final")):
        return load_align(path)
    if path.suffix == ".safetensors" or (path / WEIGHTS).is_file():
        return import_open_clip(path, spec.get("config"), spec.get("tokenizer"))
    return import_align(resolve_model(str(spec["model"]), offline=offline))


def pairs_of(config: AlignConfig) -> list[tuple[str, str]]:
    """The pairs that objectives contrast, each of which has a ``logit_scale``.

    Raises:
        UserError: a pair of something that is no stream.
    """
    found = []
    for phase in config.phases.values():
        for objective in phase.objectives:
            pairs = [objective.options.get("pair"), *(objective.options.get("pairs") or [])]
            for pair in (tuple(p) for p in pairs if p is not None):
                if pair not in found:
                    named = [s for s in pair if "@" not in s or s in config.streams]
                    check_streams(config.streams, named, f"phase '{phase.name}', objective")
                    found.append(pair)
    return found


def _from(init: Any, name: str, stream: StreamConfig) -> Any:
    """The initial model's tower for a stream."""
    if init is None or name not in init.tower_of:
        has = f"; '{', '.join(init.tower_of)}' come from init" if init is not None else ""
        raise UserError(f"stream '{name}' has no tower{has}", f"streams.{name}", "give it a 'tower'")
    tower = init.tower(name)
    if tower.modality != stream.modality:
        raise UserError(f"the initial model's '{name}' is {tower.modality}", f"streams.{name}.modality")
    return tower


def _take_scales(model: Any, init: Any) -> None:
    """Temperatures and biases of the initial model's pairs, and its limit where one of them is beyond ours."""
    import torch

    known = [p for p in model.logit_scale if p in init.logit_scale]
    # A model of the softmax loss has no bias: for the sigmoid loss its temperature is no start.
    model.started = {p for p in known if float(init.logit_bias[p].detach())}
    with torch.no_grad():
        for pair in known:
            model.logit_scale[pair].copy_(init.logit_scale[pair])
            model.logit_bias[pair].copy_(init.logit_bias[pair])
            if float(init.scale(pair)) > (model.max_logit_scale or float("inf")):
                model.max_logit_scale = init.max_logit_scale
