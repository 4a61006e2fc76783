"""Prompts to token trees, and one forward over a batch of trees: shared prefixes are computed once.

A tree is one row of the batch: ``[prefix][question 1][candidates of 1][question 2]...``. An additive 4-D mask lets a
token see its ancestors only and positions restart at each branch, so every branch gets the logits it would get alone.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mmllm.blocks.head import logits_only_at
from mmllm.decode.prompts import Prompt, PromptEncoder, join

# Sharing fewer tokens than this is not worth a dense mask.
_MIN_SHARED = 16
# Most tokens of a tree: attention over a tree is dense, so beyond this a second tree with its own prefix is cheaper.
_TREE_TOKENS = 512


@dataclass
class Tree:
    """Prompts with the same media, method and view seeds, laid out as one row per view.

    Attributes:
        prompts: one per branch.
        ids, positions, segments: [L] of the row.
        ancestors: for each segment, the segments that its tokens may see.
        branch: per prompt, the places of its own prompt tokens in the row, prefix included.
        answers: per prompt, the candidates to score, as token ids.
        ends: per prompt, per candidate, the places whose logits predict the candidate's tokens.
    """

    prompts: list[Prompt]
    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    segments: list[int] = field(default_factory=list)
    ancestors: list[set[int]] = field(default_factory=list)
    branch: list[list[int]] = field(default_factory=list)
    answers: list[list[list[int]]] = field(default_factory=list)
    ends: list[list[list[int]]] = field(default_factory=list)

    @property
    def rows(self) -> int:
        return len(self.prompts[0].views)

    @property
    def linear(self) -> bool:
        """True when every token sees all tokens before it."""
        return all(len(seen) == i + 1 for i, seen in enumerate(self.ancestors))

    def segment(self, ids: list[int], parent: int | None, start: int) -> tuple[int, list[int]]:
        """Appends a segment; returns its number and the places of its tokens."""
        number = len(self.ancestors)
        self.ancestors.append({number} | (self.ancestors[parent] if parent is not None else set()))
        places = list(range(len(self.ids), len(self.ids) + len(ids)))
        self.ids += ids
        self.positions += range(start, start + len(ids))
        self.segments += [number] * len(ids)
        return number, places

    def mask(self) -> Tensor:
        """[L, L] bool, True where the row may look."""
        n = len(self.ancestors)
        table = torch.zeros(n, n, dtype=torch.bool)
        for i, seen in enumerate(self.ancestors):
            table[i, list(seen)] = True
        segments = torch.tensor(self.segments)
        return table[segments][:, segments].tril()


def build_tree(prompts: list[Prompt], shared: int, candidates: list[list[list[int]]] | None = None) -> Tree:
    """Lays out prompts whose first ``shared`` tokens agree, with the token lists of the candidates of each."""
    tree = Tree(prompts)
    root, prefix = tree.segment(prompts[0].ids[:shared], None, 0) if shared else (None, [])
    for i, prompt in enumerate(prompts):
        number, places = tree.segment(prompt.ids[shared:], root, shared)
        tree.branch.append(prefix + places)
        tree.ends.append([])
        tree.answers.append(candidates[i] if candidates else [])
        for tokens in tree.answers[-1]:
            # The last token of a candidate is only predicted, so it is not part of the row.
            added = tree.segment(tokens[:-1], number, len(prompt.ids))[1] if len(tokens) > 1 else []
            tree.ends[-1].append([places[-1], *added])
    return tree


def build_trees(
    prompts: list[Prompt], candidates: dict[int, list[list[int]]] | None, share: bool, max_rows: int
) -> list[Tree]:
    """Groups prompts into trees, longest first.

    Without ``share`` every prompt, and every candidate of more than one token, is a row of its own.
    """
    groups: dict[tuple, list[Prompt]] = defaultdict(list)
    for i, prompt in enumerate(prompts):
        groups[prompt.group if share else (i,)].append(prompt)
    trees = []
    for group in groups.values():
        shared = _common(group)
        if len(group) == 1 or shared < max(_MIN_SHARED, group[0].placeholders):
            parts, shared = [[prompt] for prompt in group], 0
        else:
            parts = _split(group, shared, candidates, max(1, max_rows // len(group[0].views)))
        for part in parts:
            if candidates and not share:
                answers = candidates[part[0].index]
                # One-token answers add nothing to the row, so all of them are read off one.
                single, longer = [t for t in answers if len(t) == 1], [t for t in answers if len(t) > 1]
                trees += [build_tree(part, 0, [row]) for row in ([single] if single else []) + [[t] for t in longer]]
            else:
                wanted = [candidates[prompt.index] for prompt in part] if candidates else None
                trees.append(build_tree(part, shared if len(part) > 1 else 0, wanted))
    return sorted(trees, key=lambda tree: -len(tree.ids))


def _common(group: list[Prompt]) -> int:
    """Length of the common prefix, at least one token short of the shortest prompt."""
    low, high = min(p.ids for p in group), max(p.ids for p in group)
    limit = min(len(p.ids) for p in group) - 1
    return next((i for i, (a, b) in enumerate(zip(low, high)) if a != b or i == limit), limit)


def _split(group: list[Prompt], shared: int, candidates: dict | None, most: int) -> list[list[Prompt]]:
    parts: list[list[Prompt]] = [[]]
    size = 0
    for prompt in group:
        own = len(prompt.ids) - shared
        own += sum(len(tokens) - 1 for tokens in candidates[prompt.index]) if candidates else 0
        if parts[-1] and (size + own + shared > _TREE_TOKENS or len(parts[-1]) >= most):
            parts.append([])
            size = 0
        parts[-1].append(prompt)
        size += own
    return parts


def batches(trees: list[Tree], token_budget: int) -> list[list[Tree]]:
    """Trees in forwards of at most ``token_budget`` padded tokens (a single larger tree gets its own)."""
    result: list[list[Tree]] = [[]]
    for tree in trees:
        longest = len(result[-1][0].ids) if result[-1] else 0
        rows = sum(t.rows for t in result[-1]) + tree.rows
        if result[-1] and rows * longest > token_budget:
            result.append([])
        result[-1].append(tree)
    return [batch for batch in result if batch]


@dataclass
class Prefilled:
    """One forward's result.

    Attributes:
        trees, first_row, pad: the trees, the row of each one's view 0, and the left padding of each.
        logits: [n, V] at the requested places of all rows.
        index: (row, place in the padded row) -> index into n.
        cache: the key-value cache, when asked for.
    """

    trees: list[Tree]
    first_row: list[int]
    pad: list[int]
    logits: Tensor
    index: dict[tuple[int, int], int]
    cache: Any = None

    def at(self, t: int, places: list[int]) -> Tensor:
        """Logits [n, K, V] of tree t at places of its row, K views."""
        views, left = range(self.first_row[t], self.first_row[t] + self.trees[t].rows), self.pad[t]
        return self.logits[torch.tensor([[self.index[row, left + place] for row in views] for place in places])]


@torch.inference_mode()
def prefill(model: Any, encoder: PromptEncoder, trees: list[Tree], use_cache: bool) -> Prefilled:
    """Runs the trees of one batch, left-padded, all views as rows."""
    # Towers may be kept in float32 beside a bfloat16 LLM, so a model's dtype need not be the LLM's.
    device, dtype = model.device, model.get_input_embeddings().weight.dtype
    length = max(len(tree.ids) for tree in trees)
    pad = [length - len(tree.ids) for tree in trees]
    first_row, rows = [], 0
    for tree in trees:
        first_row.append(rows)
        rows += tree.rows
    ids = torch.full((rows, length), _pad_id(encoder), dtype=torch.long)
    positions = torch.zeros(rows, length, dtype=torch.long)
    media = []
    for tree, row, left in zip(trees, first_row, pad):
        ids[row : row + tree.rows, left:] = torch.tensor(tree.ids)
        positions[row : row + tree.rows, left:] = torch.tensor(tree.positions)
        for view in range(tree.rows):
            media += encoder.tensors(tree.prompts[0], view)
    wanted: list[tuple[int, int]] = []
    for tree, row, left in zip(trees, first_row, pad):
        places = {branch[-1] for branch in tree.branch} | {p for e in tree.ends for places in e for p in places}
        wanted += [(row + view, left + place) for view in range(tree.rows) for place in sorted(places)]
    with logits_only_at(model, *torch.tensor(wanted, device=device).T):
        out = model(
            input_ids=ids.to(device),
            attention_mask=_mask(trees, first_row, pad, rows, length, dtype).to(device),
            position_ids=positions.to(device),
            use_cache=use_cache,
            **{key: value.to(device) for key, value in join(media).items()},
        )
    cache = out.past_key_values if use_cache else None
    return Prefilled(trees, first_row, pad, out.logits[0], {place: i for i, place in enumerate(wanted)}, cache)


def _mask(
    trees: list[Tree], first_row: list[int], pad: list[int], rows: int, length: int, dtype: torch.dtype
) -> Tensor:
    """[rows, length] of ones and zeros when all trees are plain prompts, else additive [rows, 1, length, length]."""
    if all(tree.linear for tree in trees):
        mask = torch.ones(rows, length, dtype=torch.long)
        for tree, row, left in zip(trees, first_row, pad):
            mask[row : row + tree.rows, :left] = 0
        return mask
    # Padding sees itself, so that no row of the mask is empty.
    allowed = torch.eye(length, dtype=torch.bool).repeat(rows, 1, 1)
    for tree, row, left in zip(trees, first_row, pad):
        allowed[row : row + tree.rows, left:, left:] = tree.mask()
    # An additive float mask: a 0/1 float mask would silently be added as it is.
    return torch.where(allowed, 0.0, torch.finfo(dtype).min).to(dtype)[:, None]


def _pad_id(encoder: PromptEncoder) -> int:
    token = encoder.tokenizer.pad_token_id
    # A media placeholder as padding would ask the model for more media than there are.
    return token if token is not None and token not in encoder.placeholder_ids.values() else 0


@dataclass
class Rows:
    """Decoding state of prompts after the prefill, views of a prompt next to each other.

    Attributes:
        prompts: in row order.
        cache: a DynamicCache of R rows, or what the model returned.
        mask: [R, L] long, 1 at valid cache places.
        logits: [n, K, V] of the last prompt token, K the most views of any prompt; missing views repeat view 0.
    """

    prompts: list[Prompt]
    cache: Any
    mask: Tensor
    logits: Tensor


@torch.inference_mode()
def gather_rows(parts: list[Prefilled]) -> Rows:
    """Cuts each branch out of the trees' caches and joins all of them, left-padded, in one cache."""
    from transformers import DynamicCache

    prompts: list[Prompt] = []
    sources: list[tuple[list[int], list[list[int]]]] = []
    logits: list[Tensor] = []
    for part in parts:
        rows, places = [], []
        for t, tree in enumerate(part.trees):
            for prompt, branch in zip(tree.prompts, tree.branch):
                prompts.append(prompt)
                logits.append(part.at(t, [branch[-1]])[0])
                for view in range(tree.rows):
                    rows.append(part.first_row[t] + view)
                    places.append([part.pad[t] + p for p in branch])
        sources.append((rows, places))
    length = max(len(p) for _, places in sources for p in places)
    mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for _, places in sources for p in places])
    index = [
        (torch.tensor(rows)[:, None], torch.tensor([[0] * (length - len(p)) + p for p in places]))
        for rows, places in sources
    ]
    cache = DynamicCache()
    for layer in range(len(parts[0].cache.layers)):
        keys, values = [], []
        for part, (row, place) in zip(parts, index):
            held = part.cache.layers[layer]
            keys.append(held.keys[row, :, place].transpose(1, 2))  # [R, L, H, D] -> [R, H, L, D]
            values.append(held.values[row, :, place].transpose(1, 2))
        cache.update(torch.cat(keys), torch.cat(values), layer)
    return Rows(prompts, cache, mask, stack_views(logits))


def plain_rows(part: Prefilled) -> Rows:
    """The same from a single unshared forward, keeping the model's own cache (sliding windows, recurrent layers)."""
    prompts, logits = [], []
    for t, tree in enumerate(part.trees):
        prompts.append(tree.prompts[0])
        logits.append(part.at(t, [tree.branch[0][-1]])[0])
    length = max(len(tree.ids) for tree in part.trees)
    pads = [n for tree, n in zip(part.trees, part.pad) for _ in range(tree.rows)]
    mask = torch.tensor([[0] * n + [1] * (length - n) for n in pads])
    return Rows(prompts, part.cache, mask, stack_views(logits))


def stack_views(logits: list[Tensor]) -> Tensor:
    """[K_i, V] each -> [n, max K, V]; missing views repeat view 0 and carry no weight."""
    most = max(len(z) for z in logits)
    return torch.stack([torch.cat([z, z[:1].expand(most - len(z), -1)]) if len(z) < most else z for z in logits])
