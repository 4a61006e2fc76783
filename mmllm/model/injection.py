"""Runs an injector's layers inside any causal LM of transformers, and keeps a row's media beside its KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmllm.contracts import InjectedMedia, Injector
from mmllm.errors import UserError
from mmllm.model.places import Placed

KEY = "injected_media"  # the keyword under which media travel through the LLM to its decoder layers


def decoder_layers(llm: Any) -> nn.ModuleList:
    """The decoder layers of a causal LM, under peft's wrapper too.

    Raises:
        UserError: none found.
    """
    base = llm.get_base_model() if hasattr(llm, "get_base_model") else llm
    count = getattr(base.config, "num_hidden_layers", None)
    for module in base.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise UserError(f"no decoder layers found in {type(base).__name__}", do="use an LLM without an injector")


def watch_layers(llm: Any) -> None:
    """Lets every decoder layer pass its input through the injector that comes with the call, where one does."""

    def hook_for(index: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            media: InjectedMedia | None = kwargs.pop(KEY, None)
            if media is None:
                return args, kwargs
            media.calls += 1
            if args:
                return (media.injector(index, args[0], media), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": media.injector(index, kwargs["hidden_states"], media)}

        return hook

    for index, layer in enumerate(decoder_layers(llm)):
        layer.register_forward_pre_hook(hook_for(index), with_kwargs=True)


def media_of_rows(
    placed: Sequence[Placed],
    shape: tuple[int, int],
    attend: str,
    branch_ids: Tensor | None = None,
    document_ids: Tensor | None = None,
) -> InjectedMedia | None:
    """What each token of rows [B, L] sees: the last medium at or before it, or all of them; None without media.

    Args:
        branch_ids: [B, L]; a token sees media of its own branch and of the prefix (0).
        document_ids: [B, L]; a token sees media of its own document.
    """
    placed = [p for p in placed if len(p.tokens)]
    if not placed:
        return None
    batch, length = shape
    most = max(p.tokens.shape[1] for p in placed)
    tokens = torch.cat([F.pad(p.tokens, (0, 0, 0, most - p.tokens.shape[1])) for p in placed])
    mask = torch.cat([F.pad(p.mask, (0, most - p.mask.shape[1])) for p in placed])
    rows, columns = torch.cat([p.rows for p in placed]), torch.cat([p.columns for p in placed])
    order = (rows * length + columns).argsort(stable=True)
    rows, columns, tokens, mask = rows[order], columns[order], tokens[order], mask[order]
    count = torch.bincount(rows, minlength=batch)
    slot = torch.arange(len(rows), device=rows.device) - (count.cumsum(0) - count)[rows]
    slots = int(count.max())
    memory = tokens.new_zeros(batch, slots, most, tokens.shape[-1]).index_put((rows, slot), tokens)
    valid = mask.new_zeros(batch, slots, most).index_put((rows, slot), mask)
    start = torch.full((batch, slots), length, device=rows.device).index_put((rows, slot), columns)
    sees = start[:, None] <= torch.arange(length, device=rows.device)[:, None]  # [B, L, slots]
    first = start.clamp(max=length - 1)
    if branch_ids is not None:
        own = branch_ids.gather(1, first)[:, None]
        sees &= (own == branch_ids[..., None]) | (own == 0)
    if document_ids is not None:
        sees &= document_ids.gather(1, first)[:, None] == document_ids[..., None]
    if attend == "last":
        last = (sees * torch.arange(1, slots + 1, device=rows.device)).max(-1, keepdim=True).values
        sees &= torch.arange(1, slots + 1, device=rows.device) == last
    allowed = (sees[..., None] & valid[:, None]).flatten(2)
    return InjectedMedia(memory.flatten(1, 2), allowed)


# ---- beside the KV cache ------------------------------------------------------------------------------------------


class HeldMedia:
    """A row's media for the tokens that follow it: what its last token saw."""

    def __init__(self, media: InjectedMedia | None):
        self.tokens = media.tokens if media is not None else None
        self.allowed = media.allowed[:, -1:] if media is not None else None

    def next(self, length: int) -> InjectedMedia | None:
        if self.tokens is None or self.allowed is None:
            return None
        return InjectedMedia(self.tokens, self.allowed.expand(-1, length, -1))

    def change(self, rows: Any) -> None:
        if self.tokens is not None and self.allowed is not None:
            self.tokens, self.allowed = rows(self.tokens), rows(self.allowed)


def hold(cache: Any, media: InjectedMedia | None) -> None:
    """Puts the media beside the cache; they follow when its rows are chosen, repeated or put in another order."""
    if cache is None:
        return
    cache.held_media = HeldMedia(media)
    if "reorder_cache" in vars(cache):
        return  # its methods are wrapped already

    def wrap(name: str, rows: Any) -> None:
        if not hasattr(cache, name):
            return

        def method(self: Any, value: Any) -> Any:
            self.held_media.change(lambda x: rows(x, value))
            return getattr(type(self), name)(self, value)

        setattr(cache, name, MethodType(method, cache))

    wrap("reorder_cache", lambda x, index: x.index_select(0, index.to(x.device)))
    wrap("batch_select_indices", lambda x, index: x[index])
    wrap("batch_repeat_interleave", lambda x, repeats: x.repeat_interleave(repeats, 0))


def held(cache: Any, length: int) -> InjectedMedia | None:
    """The media that go with the next ``length`` tokens of a cache.

    Raises:
        UserError: the cache was made or copied in a way that lost them.
    """
    if not hasattr(cache, "held_media"):
        raise UserError("a cache without its media", do="keep the cache that the model returned")
    return cache.held_media.next(length)


# ---- a call of the model --------------------------------------------------------------------------------------------


def injected(
    injector: Injector, placed: Sequence[Placed], embeds: Tensor, cache: Any, *segments: Tensor | None
) -> InjectedMedia | None:
    """What the injector's layers see in a call with embeds [B, L, H]; ``segments`` as in ``media_of_rows``."""
    if cache is not None and cache.get_seq_length() > 0:
        if placed:
            raise UserError("new media after the first tokens of a cache", do="give the whole prompt at once")
        media = held(cache, embeds.shape[1])
    else:
        shape = (embeds.shape[0], embeds.shape[1])
        media = media_of_rows(placed, shape, injector.attend, *segments)
    if media is not None:
        media.injector = injector
    return media


def after_injection(model: Any, media: InjectedMedia | None, out: Any) -> None:
    """Keeps the media beside a new cache; an LLM that does not hand them to its layers must not pass silently."""
    if model.injector is None:
        return
    if media is not None and not media.calls:
        name = type(model.language_model).__name__
        raise UserError(f"{name} hands no extra input to its layers", do="use an LLM without an injector")
    cache = getattr(out, "past_key_values", None)
    if cache is not None and not hasattr(cache, "held_media"):
        hold(cache, media)
