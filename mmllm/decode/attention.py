"""Attention that treats the rows of a batch differently: boosted or pruned media keys, and attention that is read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmllm.decode.layers import layer_numbers
from mmllm.decode.spec import Op

if TYPE_CHECKING:
    from mmllm.decode.inside import Frame, Inside

NAME = "mmllm_rows"
_active: list[_Rows] = []


class _Rows:
    """What happens to the rows of the forward that is running."""

    def __init__(self, frame: Frame, depth: int, record: bool):
        self.frame, self.record = frame, record
        self.boosts: list[tuple[int, Op, set[int]]] = []
        self.prunes: list[tuple[int, Op]] = []
        self.pruned: dict[int, Tensor] = {}  # row -> columns of the keys that it no longer sees
        self.mass: list[list[Tensor]] = [[] for _ in frame.rows]  # row -> per layer, attention on its media tokens
        for r, row in enumerate(frame.rows):
            for op in row.model:
                if op.name == "boost":
                    self.boosts.append((r, op, {n - 1 for n in layer_numbers(op["layers"], depth)}))
                elif op.name == "prune":
                    self.prunes.append((r, op))


@contextmanager
def row_attention(inside: Inside, frame: Frame, record: bool = False) -> Iterator[_Rows]:
    """Within, the LLM's attention follows the operations ``boost`` and ``prune`` of each row.

    The forward must get an additive float mask [R, 1, Lq, Lk].

    Args:
        record: also keep, per row and layer, the last predicting token's attention on the media tokens, head mean.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    rows = _Rows(frame, len(inside.layers), record)
    found: list[Any] = [layer.self_attn.config for layer in inside.layers]  # type: ignore[union-attr]
    configs: dict[int, Any] = {id(config): config for config in found}
    before = {key: config._attn_implementation for key, config in configs.items()}
    _active.append(rows)
    try:
        for config in configs.values():
            config._attn_implementation = NAME
        yield rows
    finally:
        _active.remove(rows)
        for key, config in configs.items():
            config._attn_implementation = before[key]


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Scaled dot-product attention for the whole batch, then once more for the tokens of rows that differ."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    rows = _active[-1]
    layer = module.layer_idx
    assert attention_mask is not None and attention_mask.dim() == 4
    mask = attention_mask[..., : key.shape[-2]]
    if rows.pruned and any(layer >= op["from_layer"] for _, op in rows.prunes):
        mask = mask.expand(len(query), -1, -1, -1).clone()
        for r, op in rows.prunes:
            if layer >= op["from_layer"]:
                mask[r, :, :, rows.pruned[r]] = torch.finfo(mask.dtype).min
    out = sdpa_attention_forward(module, query, key, value, mask, **kwargs)[0]
    scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
    for r, op, layers in rows.boosts:
        if layer in layers:
            columns = rows.frame.queries[r]
            raw = _raw_scores(query[r, :, columns], key[r], scaling)
            media = rows.frame.media[r]
            raw[..., media] += op["alpha"] * raw[..., media].abs()
            p = (raw + mask[r, :, columns].float()).softmax(-1)
            out[r, columns] = (p @ _repeated(value[r], len(p)).float()).transpose(0, 1).to(out.dtype)
    for r, op in rows.prunes:
        if layer == op["from_layer"] - 1 and rows.frame.media[r]:
            seen = _last_attention(rows, r, query, key, mask, scaling)
            keep = max(1, round(op["keep"] * len(seen)))
            least = seen.argsort(stable=True)[keep:]
            rows.pruned[r] = torch.tensor(rows.frame.media[r], device=key.device)[least]
    if rows.record:
        for r, places in enumerate(rows.frame.media):
            if places:
                rows.mass[r].append(_last_attention(rows, r, query, key, mask, scaling))
    return out, None


def _last_attention(rows: _Rows, r: int, query: Tensor, key: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """[media tokens] attention of a row's last predicting token, mean of the heads."""
    last = rows.frame.queries[r][-1]
    p = (_raw_scores(query[r, :, [last]], key[r], scaling) + mask[r, :, [last]].float()).softmax(-1)
    return p[:, 0, rows.frame.media[r]].mean(0)


def _raw_scores(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """query [H, Q, D], key [H_kv, L, D] -> [H, Q, L] float32."""
    return query.float() @ _repeated(key, len(query)).float().transpose(-1, -2) * scaling


def _repeated(x: Tensor, heads: int) -> Tensor:
    """[H_kv, L, D] -> [H, L, D] for grouped queries."""
    return x if len(x) == heads else x.repeat_interleave(heads // len(x), dim=0)
