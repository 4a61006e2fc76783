"""What of a tower trains: nothing, all, its last blocks, or low-rank adapters in its linear layers."""

from __future__ import annotations

import copy
import logging
from typing import Any

from pydantic import Field
from torch import nn

from mmllm.config import StrictModel
from mmllm.contracts import Tower
from mmllm.errors import UserError
from mmllm.towers.video import VideoTower

log = logging.getLogger(__name__)
# Attention that hands its linear layers' weights to a function instead of calling them: an adapter there does nothing.
READS_WEIGHTS = ("MultiheadAttention", "WavLMAttention")


class LoraChoice(StrictModel):
    """Low-rank adapters (arXiv 2106.09685), by peft.

    Attributes:
        targets: ends of the names of linear layers, such as ``q_proj``; None: all linear layers of the blocks.
        dora: also learn the length of each row of the weights (arXiv 2402.09353).
    """

    r: int = Field(default=16, ge=1)
    alpha: int = Field(default=32, ge=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: list[str] | None = None
    dora: bool = False


class TrainChoice(StrictModel):
    """The dict form of ``train:``; exactly one of its keys."""

    last_n: int | None = Field(default=None, ge=1)
    lora: LoraChoice | None = None


def apply_train(tower: Tower, choice: str | dict[str, Any]) -> list[nn.Parameter]:
    """Freezes all of a tower but what ``choice`` names, and returns what is left to train.

    The tower remembers it: ``tower.trainable()`` is what may enter an optimizer, and ``train()`` keeps frozen parts in
    eval mode. With ``none`` no forward makes a graph.

    Args:
        choice: ``none``; ``full``; ``{"last_n": k}``, the last k blocks and what stands after them (BatchNorm
            excepted); ``{"lora": {"r", "alpha", "dropout", "targets", "dora"}}``, adapters alone. A video tower's
            pooling over time trains beside whatever of its frames' encoder does.

    Raises:
        UserError: not one of these, more blocks than there are, or a choice that leaves nothing to train.
    """
    inner = tower.vision if isinstance(tower, VideoTower) else tower
    inner.requires_grad_(False)
    if choice == "none":
        chosen: list[nn.Parameter] = []
    elif choice == "full":
        chosen = list(inner.parameters())
    elif isinstance(choice, dict):
        chosen = _partly(inner, _parse(choice))
    else:
        raise UserError(f"'{choice}' is no choice of what trains", "train", "none, full, {last_n: k} or {lora: {...}}")
    if isinstance(tower, VideoTower):
        inner.trains = chosen
        tower.requires_grad_(False)
        chosen = chosen + (list(tower.score.parameters()) if tower.score is not None and choice != "none" else [])
    if not chosen and choice != "none":
        raise UserError(f"nothing of this {tower.modality} tower matches", f"train: {choice}", "choose full or none")
    for parameter in chosen:
        parameter.requires_grad_(True)
    tower.trains = chosen
    total = sum(p.numel() for p in tower.parameters())
    log.info("%s tower: %d of %d weights train (%s)", tower.modality, sum(p.numel() for p in chosen), total, choice)
    return chosen


def _parse(choice: dict[str, Any]) -> TrainChoice:
    try:
        made = TrainChoice(**choice)
    except ValueError as e:
        reason = str(e).splitlines()[1:3]
        raise UserError(f"bad choice of what trains ({': '.join(r.strip() for r in reason)})", "train") from None
    if (made.last_n is None) == (made.lora is None):
        raise UserError("needs exactly one of last_n and lora", "train")
    return made


def blocks_of(tower: nn.Module) -> list[nn.Module]:
    """The layers of an encoder from first to last: its own ``blocks``, or the largest list of modules of one class.

    Raises:
        UserError: there is no such list.
    """
    own = getattr(tower, "blocks", None)
    if own is not None:
        return list(own)
    lists = [
        m
        for m in tower.modules()
        if isinstance(m, (nn.ModuleList, nn.Sequential)) and len(m) and len({type(b) for b in m}) == 1
    ]
    if not lists:
        raise UserError("this tower has no list of blocks", "train", "choose full or none")
    return list(max(lists, key=lambda m: sum(p.numel() for p in m.parameters())))


def _partly(tower: Tower, choice: TrainChoice) -> list[nn.Parameter]:
    blocks = blocks_of(tower)
    if choice.lora is not None:
        return _add_lora(tower, blocks, choice.lora)
    assert choice.last_n is not None
    if choice.last_n > len(blocks):
        raise UserError(f"this tower has {len(blocks)} blocks, not {choice.last_n}", "train.last_n")
    inside = {id(p) for b in blocks for p in b.parameters()}
    last = {id(p) for b in blocks[-choice.last_n :] for p in b.parameters()}
    norms = {id(p) for m in tower.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) for p in m.parameters()}
    # Modules stand in the order in which they run, so what is registered after the blocks comes after them.
    order = list(tower.parameters())
    end = max(i for i, p in enumerate(order) if id(p) in inside)
    return [p for i, p in enumerate(order) if id(p) in last or (i > end and id(p) not in norms)]


def linear_layers(tower: nn.Module, blocks: list[nn.Module]) -> list[str]:
    """Names of the linear layers inside the blocks; those whose weight is read past their forward are left out."""
    from transformers.pytorch_utils import Conv1D

    inside = {id(m) for b in blocks for m in b.modules()}
    hidden = {id(m) for a in tower.modules() if type(a).__name__ in READS_WEIGHTS for m in a.modules()}
    return [
        name
        for name, m in tower.named_modules()
        if isinstance(m, (nn.Linear, Conv1D)) and id(m) in inside and id(m) not in hidden
    ]


def _add_lora(tower: Tower, blocks: list[nn.Module], lora: LoraChoice) -> list[nn.Parameter]:
    from peft import LoraConfig, inject_adapter_in_model

    root = getattr(tower, "model", tower)
    names = linear_layers(root, blocks)
    chosen = [n for n in names if lora.targets is None or any(f".{n}".endswith(f".{t}") for t in lora.targets)]
    idle = [t for t in lora.targets or [] if not any(f".{n}".endswith(f".{t}") for n in names)]
    if not chosen or idle:
        kinds = sorted({n.rsplit(".", 1)[-1] for n in names})
        where, do = "train.lora.targets", f"linear layers of its blocks: {', '.join(kinds) or 'none'}"
        raise UserError(f"no linear layer of this {tower.modality} tower matches {idle or 'all'}", where, do)
    settings = LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, use_dora=lora.dora, target_modules=chosen
    )
    # peft asks a model of transformers for its own names; our towers are plain modules.
    inject_adapter_in_model(settings, root)
    return [p for n, p in tower.named_parameters() if "lora_" in n]


def merged(tower: Tower) -> Tower:
    """The tower with its adapters added into the weights, as a copy; a tower without adapters as it is."""
    if not any("lora_" in name for name, _ in tower.named_parameters()):
        return tower
    from peft.tuners.tuners_utils import BaseTunerLayer

    twin = copy.deepcopy(tower)
    for name, module in list(twin.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)
            twin.set_submodule(name, module.get_base_layer())
    twin.trains = None
    return twin
