"""LoRA layers of peft with one fused forward and backward: same numbers in less time (``benchmarks/tune_speed.py``)."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from mmllm.model.lora_groups import lora_groups


def _autocast(x: Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type)


def _plain(layer: Any, x: Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether a layer's one adapter is active, unmerged and enabled, so that the fused computation is peft's own."""
    name = layer.active_adapters[0] if len(layer.active_adapters) == 1 else None
    return not (layer.disable_adapters or layer.merged or name not in layer.lora_A or kwargs or _autocast(x))


def _forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Replaces ``peft.tuners.lora.Linear.forward``."""
    group, which = self.lora_group
    if not all(_plain(m, x, kwargs) for m in group.members):
        return type(self).forward(self, x, *args, **kwargs)
    return group(which, x)


def fuse_lora(model: nn.Module) -> int:
    """Gives plain LoRA layers of a peft model the fused computation; returns how many.

    Layers with dropout, DoRA, a bias in the adapter, quantised or trainable base weights keep peft's own forward.
    Layers with the same input are computed together (:mod:`mmllm.model.lora_groups`).
    """
    from peft.tuners.lora import Linear

    found: dict[Any, str] = {}
    for module in model.modules():
        if type(module) is not Linear or len(module.lora_A) != 1:
            continue
        (name,) = module.lora_A
        plain = isinstance(module.lora_dropout[name], nn.Identity) and not module.lora_variant
        plain = plain and type(module.base_layer) is nn.Linear and not module.base_layer.weight.requires_grad
        if plain and module.lora_B[name].bias is None:
            found[module] = name
    for group in lora_groups(found, model):
        for which, layer in enumerate(group.members):
            layer.lora_group = (group, which)
            layer.forward = MethodType(_forward, layer)
    return len(found)
