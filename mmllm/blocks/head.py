"""Runs an LLM's output head only where logits are wanted: over a large vocabulary it costs half as much as the rest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


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
