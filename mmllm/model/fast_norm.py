"""An LLM's frozen RMSNorm layers on a CPU, by :func:`mmllm.blocks.rms_norm.rms_norm`: same numbers, fewer passes."""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch import Tensor, nn

from mmllm.blocks.rms_norm import rms_norm


def _forward(self: Any, hidden_states: Tensor) -> Tensor:
    weight = self.weight
    if weight.requires_grad or weight.dtype != hidden_states.dtype or hidden_states.device.type != "cpu":
        return type(self).forward(self, hidden_states)
    return rms_norm(hidden_states, weight, self.variance_epsilon)


def fuse_norms(model: nn.Module) -> int:
    """Gives layers that compute what ``LlamaRMSNorm`` does, by the same code, the short way; returns how many.

    A layer whose weight trains, has another dtype than its input or is on a GPU keeps its own.
    """
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    count = 0
    for module in model.modules():
        own = type(module).forward
        if hasattr(module, "variance_epsilon") and own.__code__.co_code == LlamaRMSNorm.forward.__code__.co_code:
            module.forward = MethodType(_forward, module)  # type: ignore[method-assign]
            count += 1
    return count
