"""Packed rows in any causal LM of transformers: its attention goes document by document."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from mmllm.blocks.documents import Documents, document_attention
from mmllm.errors import UserError

NAME = "mmllm_packed"  # of the attention implementation
KEY = "packed_documents"  # the keyword under which the documents travel to it


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' interface: q [B, H, T, D] -> [B, T, H, D]; without documents it is plain SDPA."""
    documents: Documents | None = kwargs.pop(KEY, None)
    if documents is None:
        if softcap is not None:
            kwargs["softcap"] = softcap
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    if kwargs.get("s_aux") is not None:
        raise UserError("packing knows no attention sinks", do="leave out pack, or use another LLM")
    out = document_attention(query, key, value, documents, scaling, sliding_window, softcap, dropout)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def allow_packing(llm: Any) -> None:
    """Switches a causal LM to the attention that knows documents; rows without them run as with SDPA.

    Nothing of this is saved.

    Raises:
        UserError: an LLM with layers that mix tokens by other means than attention: its documents would leak.
    """
    config = llm.config
    kinds = {k for k in getattr(config, "layer_types", None) or () if "attention" not in k or "linear" in k}
    if kinds or any(word in config.model_type for word in ("mamba", "rwkv", "rec")):
        what = ", ".join(sorted(kinds)) or config.model_type
        raise UserError(
            f"packing keeps documents apart in attention layers alone, this LLM has {what}", do="unset pack"
        )
    llm.set_attn_implementation(NAME)


def packed_call(
    llm: Any, document_ids: Tensor, branch_ids: Tensor | None, position_ids: Tensor | None
) -> dict[str, Any]:
    """What a call of the LLM on one packed row takes beside its embeddings.

    Args:
        document_ids, branch_ids: [1, T]; position_ids: [1, T], None: counted anew in each document.

    Raises:
        ValueError: more than one row.
    """
    if len(document_ids) != 1:
        raise ValueError("a packed batch is one row")
    if llm.config._attn_implementation != NAME:
        allow_packing(llm)
    documents = Documents.of(document_ids[0], None if branch_ids is None else branch_ids[0])
    if position_ids is None:
        position_ids = documents.positions(document_ids.device)[None]
    # A mask of four dimensions passes through transformers as it is: none is made, and ours reads none.
    none = torch.zeros(1, 1, 1, 1, device=document_ids.device)
    return {KEY: documents, "position_ids": position_ids, "attention_mask": none}
