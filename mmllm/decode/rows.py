"""The state of requests while they decode: the rows of all their views in one cache, gathered from the prefill."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmllm.decode.inside import Inside
from mmllm.decode.mix import Taps
from mmllm.decode.prefill import Prefilled
from mmllm.decode.prompts import Prompt, Row


@dataclass
class State:
    """Requests between two steps, rows of a request next to each other.

    Attributes:
        prompts: in row order.
        cache: a DynamicCache of R rows, or what the model returned.
        mask: [R, L] long, 1 at valid cache places.
        media: per row, the cache places of its media tokens.
        logits: [n, K, V] of the last token, K the most views of any request; missing views repeat view 0.
        taps: per request, logits [layers, V] of its taps.
    """

    prompts: list[Prompt]
    cache: Any
    mask: Tensor
    media: list[list[int]]
    logits: Tensor
    taps: list[Taps]


class Ends:
    """Finds, for a row and what follows it, the logits in the forwards of a prefill."""

    def __init__(self, inside: Inside, parts: Sequence[Prefilled]):
        self.inside, self.parts = inside, parts
        self.home: dict[tuple[int, tuple[int, ...]], tuple[int, int, list[int]]] = {}
        self.branch: dict[int, tuple[int, int, list[int]]] = {}
        for p, part in enumerate(parts):
            for t, tree in enumerate(part.trees):
                for row, places in tree.branch.items():
                    self.branch[row] = (p, t, places)
                for key, places in tree.ends.items():
                    self.home[key] = (p, t, places)

    def logits(self, row: Row, tokens: Sequence[int] = ()) -> Tensor:
        """[n, V] that predict ``tokens`` one by one after the row; without tokens [1, V], what comes next."""
        return self._part(row, tokens).logits[self.places(row, tokens)]

    def taps(self, prompt: Prompt, tokens: Sequence[int] = ()) -> list[Taps]:
        """For the same places of the base row, the logits [layers, V] of the method's taps."""
        if not prompt.spec.taps:
            return [{} for _ in range(len(tokens) or 1)]
        part, picked = self._part(prompt.rows[0], tokens), self.places(prompt.rows[0], tokens)
        found = {tap: self.inside.tap_logits(tap, part.captured, picked) for tap in prompt.spec.taps}
        return [{tap: z[i] for tap, z in found.items()} for i in range(len(picked))]

    def places(self, row: Row, tokens: Sequence[int] = ()) -> Tensor:
        """The same as ``logits``, as indices into the logits and captured states of the row's forward."""
        if tokens:
            p, t, places = self.home[id(row), tuple(tokens)]
        else:
            p, t, places = self.branch[id(row)]
            places = places[-1:]
        return torch.tensor([self.parts[p].index[t, place] for place in places])

    def _part(self, row: Row, tokens: Sequence[int]) -> Prefilled:
        return self.parts[self.home[id(row), tuple(tokens)][0] if tokens else self.branch[id(row)][0]]

    def views(self, prompt: Prompt, tokens: Sequence[int] = ()) -> Tensor:
        """[n, K, V]: the logits of all views of a request."""
        each = [self.logits(row, tokens) for row in prompt.rows]
        return torch.stack([each[i] for i in prompt.view_row], dim=1)


@torch.inference_mode()
def gathered(inside: Inside, prompts: list[Prompt], parts: list[Prefilled]) -> State:
    """Cuts each row out of the trees' caches and joins all of them, left-padded, in one cache."""
    from transformers import DynamicCache

    ends = Ends(inside, parts)
    rows = [row for prompt in prompts for row in prompt.rows]
    homes = [ends.branch[id(row)] for row in rows]
    length = max(len(row.ids) for row in rows)
    columns = [[parts[p].column(t, place) for place in places] for p, t, places in homes]
    mask = torch.tensor([[0] * (length - len(c)) + [1] * len(c) for c in columns])
    index = torch.tensor([[0] * (length - len(c)) + c for c in columns])
    of_part = [torch.tensor([i for i, home in enumerate(homes) if home[0] == p]) for p in range(len(parts))]
    batch_rows = [torch.tensor([homes[i][1] for i in members])[:, None] for members in of_part]
    order = torch.cat(of_part).argsort()
    cache = DynamicCache()
    for layer in range(len(parts[0].cache.layers)):
        keys, values = [], []
        for part, members, row in zip(parts, of_part, batch_rows):
            held = part.cache.layers[layer]
            keys.append(held.keys[row, :, index[members]].transpose(1, 2))  # [R, L, H, D] -> [R, H, L, D]
            values.append(held.values[row, :, index[members]].transpose(1, 2))
        cache.update(torch.cat(keys)[order], torch.cat(values)[order], layer)
    return _state(ends, prompts, rows, cache, mask)


def plain(inside: Inside, prompts: list[Prompt], part: Prefilled) -> State:
    """The same from a single unshared forward, keeping the model's own cache (sliding windows, recurrent layers)."""
    rows = [row for prompt in prompts for row in prompt.rows]
    length = max(len(tree.ids) for tree in part.trees)
    ends = Ends(inside, [part])
    order = torch.tensor([ends.branch[id(row)][1] for row in rows])
    part.cache.batch_select_indices(order)
    mask = torch.tensor([[0] * (length - len(row.ids)) + [1] * len(row.ids) for row in rows])
    return _state(ends, prompts, rows, part.cache, mask)


def _state(ends: Ends, prompts: list[Prompt], rows: list[Row], cache: Any, mask: Tensor) -> State:
    length = mask.shape[1]
    media = [[length - len(row.ids) + place for place in row.media_places] for row in rows]
    logits = stack_views([ends.views(prompt)[0] for prompt in prompts])
    return State(prompts, cache, mask, media, logits, [ends.taps(prompt)[0] for prompt in prompts])


def stack_views(logits: list[Tensor]) -> Tensor:
    """[K_i, V] each -> [n, max K, V]; missing views repeat view 0 and carry no weight."""
    most = max(len(z) for z in logits)
    return torch.stack([torch.cat([z, z[:1].expand(most - len(z), -1)]) if len(z) < most else z for z in logits])


def by_view(logits: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """[R, V] with the rows of a request next to each other -> [n, max K, V]."""
    most = max(len(prompt.view_row) for prompt in prompts)
    if most == 1:
        return logits[:, None]
    table, first = [], 0
    for prompt in prompts:
        table.append([first + i for i in prompt.view_row] + [first] * (most - len(prompt.view_row)))
        first += len(prompt.rows)
    return logits[torch.tensor(table, device=logits.device)]
