"""Runs an LLM's output head only where logits are wanted: over a large vocabulary it costs half as much as the rest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmllm.blocks.lm_head_loss import CHUNK, lm_head_loss


@contextmanager
def logits_only_at(model: Any, rows: Tensor, columns: Tensor) -> Iterator[None]:
    """Within, a causal LM gives logits [1, n, V] of the n places (rows[i], columns[i]) of its hidden states [B, L, H].

    Whatever the model does to its logits after the head (scaling, soft caps) still applies. The model must be called
    so that its head sees all positions (``logits_to_keep`` 0, its default).
    """

    def select(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0][rows, columns][None], *args[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


@dataclass
class HeadLoss:
    """What ``loss_at_head`` found: the loss, and the logits [1, 1, V] that the model gives for the first place."""

    loss: Tensor | None = None
    first: Tensor | None = None


def after_head(config: Any) -> tuple[float, float | None]:
    """What a causal LM does to its logits after the head, from its config: a factor and a soft cap.

    Gemma caps; Cohere and Falcon-H1 multiply, Granite divides.
    """

    def factor(name: str) -> float:
        return float(getattr(config, name, None) or 1.0)

    scale = factor("logit_scale") * factor("lm_head_multiplier") / factor("logits_scaling")
    return scale, getattr(config, "final_logit_softcapping", None)


@contextmanager
def loss_at_head(
    model: Any, rows: Tensor, columns: Tensor, targets: Tensor, share: Tensor | None = None
) -> Iterator[HeadLoss]:
    """Within, a causal LM's head makes the mean cross-entropy at the places (rows[i], columns[i]) of its hidden states.

    The head gives logits [1, 1, V] of the first place alone, so that no logits are kept. The loss is made inside the
    head's own call, where sharded weights are whole; a head that is no plain linear layer runs in chunks as it is. The
    caller compares ``first`` with the model's logits: where they differ, the model does more to its logits than
    ``after_head`` knows, and the loss is not its.

    Args:
        targets: [n] int64; share: [n] weights of the mean, None: all alike.
    """
    head = model.get_output_embeddings()
    scale, softcap = after_head(model.config.get_text_config())
    own, plain, found = vars(head).get("forward"), head.forward, HeadLoss()

    def bend(z: Tensor) -> Tensor:
        z = z * scale if scale != 1 else z
        return z if softcap is None else torch.tanh(z / softcap) * softcap

    def forward(states: Tensor) -> Tensor:
        hidden = states[rows, columns]
        first = plain(hidden[:1].detach()[None])
        found.first = bend(first.detach())
        if type(head) is nn.Linear:
            found.loss = lm_head_loss(hidden, head.weight, targets, share, head.bias, scale, softcap)
        else:
            found.loss = _in_chunks(lambda h: bend(plain(h)), hidden, targets, share, first.shape[-1])
        return first

    head.forward = forward
    try:
        yield found
    finally:
        del head.forward
        if own is not None:  # a fused LoRA layer has a forward of its own
            head.forward = own


@contextmanager
def states_at_head(model: Any, rows: Tensor, columns: Tensor) -> Iterator[list[Tensor]]:
    """Within, a causal LM puts its hidden states [n, H] at the places (rows[i], columns[i]) into the list given.

    Its head makes logits of the first place alone.
    """
    head = model.get_output_embeddings()
    own, plain = vars(head).get("forward"), head.forward
    found: list[Tensor] = []

    def forward(states: Tensor) -> Tensor:
        found.append(states[rows, columns])
        return plain(found[-1][:1].detach()[None])

    head.forward = forward
    try:
        yield found
    finally:
        del head.forward
        if own is not None:
            head.forward = own


def _in_chunks(logits: Any, hidden: Tensor, targets: Tensor, share: Tensor | None, vocabulary: int) -> Tensor:
    """The same loss for any head; each chunk's logits are made again in the backward."""
    rows = max(1, CHUNK // vocabulary)
    share = hidden.new_ones(len(hidden), dtype=torch.float32) if share is None else share

    def part(h: Tensor, target: Tensor, w: Tensor) -> Tensor:
        each = F.cross_entropy(logits(h).float(), target, reduction="none")
        return (each * w).sum()

    parts = zip(hidden.split(rows), targets.split(rows), share.split(rows))
    return sum(checkpoint(part, *p, use_reentrant=False) for p in parts) / share.sum()  # type: ignore[operator]
