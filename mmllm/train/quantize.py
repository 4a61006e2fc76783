"""QLoRA (arXiv 2305.14314): the LLM's frozen weights in 4 bits by bitsandbytes, and plain weights again after it."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from mmllm.errors import UserError

ON_CPU = "MMLLM_4BIT_ON_CPU"  # bitsandbytes also computes on CPUs, slowly: for trying a config


def need_bitsandbytes() -> None:
    """Makes sure that weights can be held in 4 bits here.

    Raises:
        UserError: bitsandbytes is not installed, or there is no GPU.
    """
    where = "llm_quantization"
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("bitsandbytes is not installed", where, "pip install 'mmllm[qlora]', or leave it out")
    if not torch.cuda.is_available() and os.environ.get(ON_CPU) != "1":
        raise UserError("weights in 4 bits want a GPU, and none is here", where, f"leave it out ({ON_CPU}=1 tries it)")


def linear_layers(llm: Any) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """The LLM's linear layers but its head, with the module that holds each and its name there."""
    head = llm.get_output_embeddings()
    for parent in list(llm.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and child is not head:
                yield parent, name, child


def quantize_llm(llm: Any, dtype: torch.dtype, device: torch.device) -> int:
    """Holds the weights of a causal LM's linear layers, but the head's, in NF4 on ``device``; returns how many layers.

    Blocks of 64 weights share a scale, and the scales are quantized too. Biases and all other weights stay as they are.

    Args:
        dtype: that the layers compute in.
    """
    import bitsandbytes  # pyright: ignore[reportMissingImports]  (an extra)

    bnb: Any = bitsandbytes

    count = 0
    for parent, name, old in linear_layers(llm):
        bias = old.bias is not None
        new = bnb.nn.Linear4bit(old.in_features, old.out_features, bias, dtype, True, "nf4", device="meta")
        new.weight = bnb.nn.Params4bit(
            old.weight.data.to(dtype), requires_grad=False, quant_type="nf4", compress_statistics=True
        )
        if bias:
            new.bias = old.bias
        new.support_avx512bf16_for_cpu = False  # else a CPU packs them anew in another order
        setattr(parent, name, new.to(device))
        count += 1
    llm.is_loaded_in_4bit = True  # peft looks here
    return count


@torch.no_grad()
def plain_llm(llm: Any, dtype: torch.dtype) -> Any:
    """The causal LM that computes as a quantized one does, with its adapters merged, in ordinary linear layers.

    The merged weights are those that were trained: the 4-bit ones made wide again plus the adapters.
    """
    from peft.tuners.lora import LoraLayer

    base = llm.get_base_model() if hasattr(llm, "get_base_model") else llm
    for parent in list(base.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LoraLayer):
                setattr(parent, name, _merged(child, dtype))
            elif type(child).__name__ == "Linear4bit":
                setattr(parent, name, _wide(child, dtype, 0.0))
    base.is_loaded_in_4bit = False
    return base


def _merged(layer: Any, dtype: torch.dtype) -> nn.Linear:
    delta = sum(layer.get_delta_weight(name).float() for name in layer.active_adapters)
    return _wide(layer.get_base_layer(), dtype, delta)


def _wide(layer: Any, dtype: torch.dtype, delta: Any) -> nn.Linear:
    """A Linear4bit as an ordinary layer, with something added to its weights."""
    from bitsandbytes.functional import dequantize_4bit  # pyright: ignore[reportMissingImports]

    weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state).float() + delta
    new = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    new.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    if layer.bias is not None:
        new.bias = nn.Parameter(layer.bias.data.to(dtype), requires_grad=False)
    return new
