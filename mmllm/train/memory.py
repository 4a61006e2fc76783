"""About how much memory a run takes, said before its first step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mmllm.model.plain_attention import NAME as PLAIN_ATTENTION
from mmllm.train.launch import is_main
from mmllm.train.params import ParamGroup

# Bytes that an optimizer keeps for each trained weight, by its name in TrainingArguments; as a share of the weight's
# own bytes (the first number), or in bytes whatever the weight is (the second).
STATES = {"sgd": (0.0, 0), "adafactor": (0.02, 0), "lion": (1.0, 0), "adagrad": (1.0, 0), "rmsprop": (1.0, 0)}
EIGHT_BIT = (0.0, 2)
ADAM = (2.0, 0)
# Numbers of width `hidden` that one layer keeps for its backward, for each token: the inputs of norms, projections and
# sums, queries and the attention's result. Keys, values and the MLP's inner numbers are counted by their own widths.
# See Korthikanti et al. (arXiv 2205.05198), section 4, for the count in a GPT layer.
OWN_WIDTH = 8
INNER_WIDTH = 4


@dataclass
class Memory:
    """Bytes in each process.

    Attributes:
        weights: parameters and buffers as they are held now.
        gradients, optimizer: of the parameters that train.
        activations: what the forward keeps for the backward; an estimate that may be off by a factor of two.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


def estimate_memory(
    model: Any, groups: Sequence[ParamGroup], optim: str, tokens: int, row: int, pictures: int, checkpointing: bool
) -> Memory:
    """Memory of a training step of a multimodal LLM, without what several processes may share.

    Args:
        optim: name of the optimizer, as TrainingArguments has it.
        tokens: of a micro-batch, with padding; row: of one of its rows (attention that isn't fused keeps row² numbers).
        pictures: in a micro-batch, for towers that train.
        checkpointing: layers keep their inputs alone (gradient checkpointing).
    """
    held: Iterable[torch.Tensor] = (*model.parameters(), *model.buffers())
    trained = [p for g in groups for p in g.params]
    share, fixed = optimizer_bytes(optim)
    gradients = sum(p.numel() * p.element_size() for p in trained)
    activations = llm_activations(model.language_model, tokens, row, checkpointing)
    for tower in (model.vision_tower, model.audio_tower):
        if tower is not None and any(p.requires_grad for p in tower.parameters()):
            activations += tower_activations(tower, pictures)
    return Memory(
        sum(t.numel() * t.element_size() for t in held),
        gradients,
        round(share * gradients) + fixed * sum(p.numel() for p in trained),
        activations,
    )


def optimizer_bytes(optim: str) -> tuple[float, int]:
    """What an optimizer keeps for a weight: (times the weight's own bytes, bytes beside)."""
    if "8bit" in optim:
        return EIGHT_BIT
    return next((v for k, v in STATES.items() if optim.removeprefix("paged_").startswith(k)), ADAM)


def llm_activations(llm: Any, tokens: int, row: int, checkpointing: bool) -> int:
    """Bytes that the LLM's layers keep for ``tokens`` tokens."""
    config, size = llm.config, llm.get_input_embeddings().weight.element_size()
    hidden, layers, heads = config.hidden_size, config.num_hidden_layers, config.num_attention_heads
    head = getattr(config, "head_dim", None) or hidden // heads
    keys = 2 * head * (getattr(config, "num_key_value_heads", None) or heads)
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    numbers = OWN_WIDTH * hidden + keys + INNER_WIDTH * inner
    if getattr(config, "_attn_implementation", "") in ("eager", PLAIN_ATTENTION):
        numbers += 2 * heads * row
    if checkpointing:  # every layer's input, and all of the one layer that is made again
        return tokens * (layers * hidden + numbers) * size
    return tokens * layers * numbers * size


def tower_activations(tower: nn.Module, count: int) -> int:
    """Bytes that a tower's blocks keep for ``count`` media; 0 for towers whose size is not known before they run."""
    from mmllm.errors import UserError
    from mmllm.towers.training import blocks_of

    try:
        each = int(tower.num_tokens())  # type: ignore[operator]
        blocks = len(blocks_of(tower))
    except (UserError, TypeError, ValueError, NotImplementedError):
        return 0
    width, size = int(tower.hidden_size), next(tower.parameters()).element_size()  # type: ignore[arg-type]
    return count * each * blocks * (OWN_WIDTH + 4 * INNER_WIDTH) * width * size


def print_memory(memory: Memory) -> None:
    """One line; towers and LLM of a frozen kind need their weights alone."""
    if not is_main():
        return
    parts = {k: getattr(memory, k) for k in ("weights", "gradients", "optimizer", "activations")}
    said = ", ".join(f"{k} {shown(v)}" for k, v in parts.items())
    print(f"Memory, about {shown(memory.total)} a process: {said} (activations: rough)", flush=True)


def shown(size: int) -> str:
    """Bytes as GB or MB."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
