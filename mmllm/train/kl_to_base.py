"""Keeps a tuned LLM near itself: the divergence from its own words without adapters, on text without media."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmllm.blocks.head import after_head, states_at_head
from mmllm.blocks.lm_head_loss import CHUNK
from mmllm.contracts import StepHook
from mmllm.data.conversations import IGNORE, branch_mask
from mmllm.errors import UserError
from mmllm.model.packing import packed_call

TOKEN_KEYS = (
    "input_ids", "labels", "label_weights", "position_ids", "attention_mask", "branch_ids", "document_ids"
)  # fmt: skip


class KLToBase(StepHook):
    """Adds weight * KL(tuned || base) to the loss at every supervised token of conversations without media.

    The sum over these tokens is divided by the batch's ``num_items``, as their cross-entropy is, so that accumulation
    steps and processes change nothing. ``kl_to_base`` in the log is what is added.

    Args:
        media_ids: the placeholder tokens; a row (or a packed document) that holds one is left out.

    Raises:
        UserError: an LLM without adapters, whose base is gone.
    """

    def __init__(self, model: Any, weight: float, media_ids: list[int]):
        if not hasattr(model.language_model, "disable_adapter"):
            raise UserError("the base is the LLM without its adapters, and it has none", "kl_to_base", "set llm: lora")
        self.weight, self.media_ids = weight, media_ids

    def after_loss(self, model: nn.Module, batch: Any, losses: dict[str, Any], step: int) -> None:
        chosen = text_only(batch, self.media_ids)
        if chosen is None:
            losses["kl_to_base"] = torch.zeros_like(losses["loss"])
            return
        term = self.weight * kl_sum(model, chosen) / max(float(batch["num_items"]), 1e-9)
        losses["kl_to_base"] = term.detach()
        losses["loss"] = losses["loss"] + term


def text_only(batch: dict[str, Any], media_ids: list[int]) -> dict[str, Tensor] | None:
    """The token tensors of a batch without the rows, or packed documents, that hold media; None where none is left
    with a supervised token."""
    ids = batch["input_ids"]
    media = torch.isin(ids, torch.tensor(media_ids, device=ids.device))
    held = {k: batch[k] for k in TOKEN_KEYS if batch.get(k) is not None}
    if "document_ids" in held:
        documents = held["document_ids"]
        keep = ~torch.isin(documents[0], documents[media])
        chosen = {k: v[:, keep] for k, v in held.items()}
    else:
        rows = ~media.any(1)
        length = int(held["attention_mask"][rows].sum(1).max()) if bool(rows.any()) else 0
        chosen = {k: v[rows, :length] for k, v in held.items()}
    return chosen if bool((chosen["labels"][:, 1:] != IGNORE).any()) else None


def kl_sum(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Sum over supervised tokens of KL(tuned || base), weighted by ``label_weights``; logits exist in chunks alone.

    Args:
        batch: token tensors [B, L] without media, as in the model's forward.

    Raises:
        UserError: an LLM that changes its logits in a way of its own.
    """
    if model._chunked_loss is False:
        kind = model.config.text_config.model_type
        raise UserError(f"a '{kind}' changes its logits in a way of its own", "kl_to_base", "leave it out")
    rows, columns = (batch["labels"][:, 1:] != IGNORE).nonzero(as_tuple=True)
    llm = model.language_model
    with torch.no_grad(), llm.disable_adapter():
        base = _states(model, batch, rows, columns)
    tuned = _states(model, batch, rows, columns)
    share = batch["label_weights"][rows, columns + 1] if "label_weights" in batch else torch.ones_like(tuned[:, 0])
    scale, softcap = after_head(llm.config.get_text_config())
    head = model.get_output_embeddings()
    plain = head.get_base_layer() if hasattr(head, "get_base_layer") else head

    def words(layer: nn.Module, states: Tensor) -> Tensor:
        z = layer(states).float() * scale
        return (z if softcap is None else torch.tanh(z / softcap) * softcap).log_softmax(-1)

    def part(mine: Tensor, other: Tensor, weights: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = words(plain, other)
        return (F.kl_div(wanted, words(head, mine), reduction="none", log_target=True).sum(-1) * weights).sum()

    size = max(1, CHUNK // model.get_input_embeddings().weight.shape[0])
    parts = zip(tuned.split(size), base.split(size), share.float().split(size))
    return sum((checkpoint(part, *p, use_reentrant=False) for p in parts), tuned.new_zeros((), dtype=torch.float32))  # type: ignore[return-value, arg-type]


def _states(model: Any, batch: dict[str, Tensor], rows: Tensor, columns: Tensor) -> Tensor:
    """The LLM's last hidden states [n, H] at places of rows without media."""
    embeds = model.get_input_embeddings()(batch["input_ids"])
    branches, documents = batch.get("branch_ids"), batch.get("document_ids")
    mask: Tensor = batch["attention_mask"]
    if branches is not None and documents is None:
        mask = branch_mask(branches, embeds.dtype)
    run: dict[str, Any] = {"attention_mask": mask, "position_ids": batch.get("position_ids"), "use_cache": False}
    if documents is not None:
        run |= packed_call(model.language_model, documents, branches, batch.get("position_ids"))
    with states_at_head(model, rows, columns) as found:
        model.language_model(inputs_embeds=embeds, **run)
    return found[0]
