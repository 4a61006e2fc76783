"""About how much memory each process of a sharded run takes, from shapes alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from mmllm.model.injection import decoder_layers
from mmllm.train.memory import Memory, optimizer_bytes
from mmllm.train.params import ParamGroup

LIVE = 10**9  # parameters that ZeRO-3 holds whole at most (stage3_max_live_parameters, its default)
# Bits of a weight in NF4 with blocks of 64 and doubly quantized scales: 4 + 8/64 + 32/(64*256), arXiv 2305.14314.
NF4 = (4 + 8 / 64 + 32 / (64 * 256)) / 8


def shared_memory(
    whole: Memory, model: Any, groups: Sequence[ParamGroup], optim: str, way: str, processes: int, bf16: bool
) -> Memory:
    """What one of ``processes`` holds, by the counts of ZeRO (arXiv 1910.02054, section 5).

    Args:
        whole: the estimate without sharding (``estimate_memory``).
        way: ``ddp``, ``zero0`` to ``zero3``, ``fsdp2``.
        bf16: ``train.bf16``: mixed precision with float32 copies of what trains.
    """
    trained = [p for g in groups for p in g.params]
    count, share = sum(p.numel() for p in trained), optimizer_bytes(optim)
    total = sum(p.numel() for p in model.parameters())
    held = sum(p.numel() * p.element_size() for p in trained)
    states = round(share[0] * 4 * count) + share[1] * count
    if way == "fsdp2":
        wide = 4 * count if bf16 else held
        weights = (whole.weights - held + wide) / processes + gathered(model, bf16)
        optimizer = states if bf16 else whole.optimizer
        return Memory(round(weights), round(wide / processes), round(optimizer / processes), whole.activations)
    stage = int(way.removeprefix("zero")) if way.startswith("zero") else 0
    if stage == 0:
        return whole
    # DeepSpeed casts the whole model, and keeps a float32 copy of what trains beside the optimizer's states.
    weights = 2 * total if bf16 else whole.weights
    gradients = 2 * count if bf16 else held
    each = weights / max(total, 1)
    if stage == 3:
        weights = weights / processes + min(total, LIVE) * each
    gradients = gradients / processes if stage >= 2 else gradients
    return Memory(round(weights), round(gradients), round((states + 4 * count) / processes), whole.activations)


def gathered(model: Any, bf16: bool) -> int:
    """Bytes that FSDP2 holds whole at one time: two layers of the LLM, and all that is in no layer."""
    layers = list(decoder_layers(model.language_model))
    inside = {id(p) for layer in layers for p in layer.parameters()}

    def size(params: Any) -> int:
        return sum(p.numel() * (2 if bf16 else p.element_size()) for p in params)

    return 2 * max(map(size, (layer.parameters() for layer in layers))) + size(
        p for p in model.parameters() if id(p) not in inside
    )


def saved_by_4bit(llm: Any) -> int:
    """Bytes that the LLM's linear layers take less when their frozen weights are held in 4 bits (not the head)."""
    head = llm.get_output_embeddings()
    frozen = [m.weight for m in llm.modules() if type(m) is nn.Linear and m is not head and not m.weight.requires_grad]
    return sum(round(w.numel() * (w.element_size() - NF4)) for w in frozen)
