"""Rows to token trees, and one forward over a batch of trees: shared prefixes are computed once.

A tree is one row of the batch: ``[prefix][question 1][candidates of 1][question 2]...``. A mask lets a token see its
ancestors only and positions restart at each branch, so every branch gets the logits it would get alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mmllm.blocks.head import logits_only_at
from mmllm.decode.inside import Captured, Frame, Inside
from mmllm.decode.prompts import PromptEncoder, Row, join
from mmllm.decode.spec import Tap

# Sharing fewer tokens than this is not worth a dense mask or a forward of its own.
_MIN_SHARED = 16
# Most tokens of a tree: attention over a tree is dense, so beyond this a second tree with its own prefix is cheaper.
_TREE_TOKENS = 512

Answers = dict[int, list[list[int]]]  # id(row) -> candidates to score after it, as token ids


@dataclass
class Tree:
    """Rows with the same media and the same treatment, laid out as one row of the batch.

    Attributes:
        row: any of them; its media and operations are those of all.
        ids, positions, segments: [L].
        ancestors: for each segment, the segments that its tokens may see.
        branch: id(row) -> the places of its own prompt tokens, prefix included.
        ends: (id(row), candidate tokens) -> the places whose logits predict the candidate's tokens.
    """

    row: Row
    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    segments: list[int] = field(default_factory=list)
    ancestors: list[set[int]] = field(default_factory=list)
    branch: dict[int, list[int]] = field(default_factory=dict)
    ends: dict[tuple[int, tuple[int, ...]], list[int]] = field(default_factory=dict)

    @property
    def linear(self) -> bool:
        """True when every token sees all tokens before it."""
        return all(len(seen) == i + 1 for i, seen in enumerate(self.ancestors))

    @property
    def predicting(self) -> list[int]:
        """All places whose logits are wanted, ascending."""
        return sorted({places[-1] for places in self.branch.values()} | {p for e in self.ends.values() for p in e})

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


def build_tree(rows: Sequence[Sequence[Row]], shared: int, answers: Answers) -> Tree:
    """Lays out rows whose first ``shared`` tokens agree, with the candidates of each.

    Args:
        rows: groups of rows with equal tokens; a group is laid out once.
    """
    tree = Tree(rows[0][0])
    root, prefix = tree.segment(rows[0][0].ids[:shared], None, 0) if shared else (None, [])
    for equal in rows:
        number, places = tree.segment(equal[0].ids[shared:], root, shared)
        done: dict[tuple[int, ...], list[int]] = {}
        for row in equal:
            tree.branch[id(row)] = prefix + places
            for tokens in answers.get(id(row), ()):
                key = tuple(tokens)
                if key not in done:
                    # The last token of a candidate is only predicted, so it is not part of the row.
                    added = tree.segment(tokens[:-1], number, len(row.ids))[1] if len(tokens) > 1 else []
                    done[key] = [places[-1], *added]
                tree.ends[id(row), key] = done[key]
    return tree


def build_trees(rows: Iterable[Row], answers: Answers, share: bool, most: int = 1_000_000) -> list[Tree]:
    """Groups rows into trees, longest first.

    Args:
        share: without it every row, and every candidate of more than one token, is a tree of its own.
        most: most different rows of a tree.
    """
    if not share:
        trees = []
        for row in rows:
            # One-token answers add nothing to the row, so all of them are read off one.
            wanted = answers.get(id(row), [])
            single, longer = [t for t in wanted if len(t) == 1], [t for t in wanted if len(t) > 1]
            for part in ([single] if single or not longer else []) + [[t] for t in longer]:
                trees.append(build_tree([[row]], 0, {id(row): part}))
        return sorted(trees, key=lambda tree: -len(tree.ids))
    groups: dict[tuple, dict[tuple[int, ...], list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        groups[row.key][tuple(row.ids)].append(row)
    trees = []
    for group in groups.values():
        equal = list(group.values())
        shared = _common([rows[0].ids for rows in equal])
        if len(equal) == 1 or shared < max(_MIN_SHARED, equal[0][0].placeholders):
            trees += [build_tree([same], 0, answers) for same in equal]
        else:
            trees += [
                build_tree(part, shared if len(part) > 1 else 0, answers)
                for part in _split(equal, shared, answers, most)
            ]
    return sorted(trees, key=lambda tree: -len(tree.ids))


def _common(ids: list[list[int]]) -> int:
    """Length of the common prefix, at least one token short of the shortest."""
    low, high = min(ids), max(ids)
    limit = min(len(x) for x in ids) - 1
    return next((i for i, (a, b) in enumerate(zip(low, high)) if a != b or i == limit), limit)


def _split(equal: list[list[Row]], shared: int, answers: Answers, most: int) -> list[list[list[Row]]]:
    parts: list[list[list[Row]]] = [[]]
    size = 0
    for rows in equal:
        candidates = {tuple(tokens) for row in rows for tokens in answers.get(id(row), ())}
        own = len(rows[0].ids) - shared + sum(len(tokens) - 1 for tokens in candidates)
        if parts[-1] and (size + own + shared > _TREE_TOKENS or len(parts[-1]) >= most):
            parts.append([])
            size = 0
        parts[-1].append(rows)
        size += own
    return parts


def batches(trees: list[Tree], token_budget: int) -> list[list[Tree]]:
    """Trees in forwards of at most ``token_budget`` padded tokens (a single larger tree gets its own)."""
    result: list[list[Tree]] = [[]]
    for tree in trees:
        longest = len(result[-1][0].ids) if result[-1] else 0
        if result[-1] and (len(result[-1]) + 1) * longest > token_budget:
            result.append([])
        result[-1].append(tree)
    return [batch for batch in result if batch]


@dataclass
class Prefilled:
    """One forward's result.

    Attributes:
        trees: one per row of the batch.
        lead: tokens that all rows have in common before their media, computed once.
        pad: the padding of each row, between the common tokens and its own.
        logits: [n, V] at the requested places of all rows.
        index: (row of the batch, place in the tree) -> index into n.
        captured: states of early layers at the same places.
        cache: the key-value cache, when asked for.
    """

    trees: list[Tree]
    lead: int
    pad: list[int]
    logits: Tensor
    index: dict[tuple[int, int], int]
    captured: Captured
    cache: Any = None

    def column(self, t: int, place: int) -> int:
        """Where a place of tree t lies in the cache."""
        return place if place < self.lead else self.pad[t] + place


@torch.inference_mode()
def prefill(
    model: Any,
    encoder: PromptEncoder,
    inside: Inside,
    trees: list[Tree],
    use_cache: bool,
    taps: Sequence[Tap] = (),
    states: Sequence[int] = (),
    share: bool = True,
) -> Prefilled:
    """Runs the trees of one batch, padded on the left.

    Args:
        taps: methods' taps; the states that they need are captured.
        states: further layers (from 1) whose states are captured.
        share: compute tokens that all rows begin with, before any media, once.
    """
    # Towers may be kept in float32 beside a bfloat16 LLM, so a model's dtype need not be the LLM's.
    device, dtype = model.device, model.get_input_embeddings().weight.dtype
    changed = any(tree.row.model for tree in trees)
    lead = _lead(trees) if share and not changed else 0
    length = max(len(tree.ids) for tree in trees)
    pad = [length - len(tree.ids) for tree in trees]
    ids = torch.full((len(trees), length - lead), _pad_id(encoder), dtype=torch.long)
    positions = torch.zeros(len(trees), length - lead, dtype=torch.long)
    media: list[dict[str, Tensor]] = []
    wanted: list[tuple[int, int]] = []
    for r, (tree, left) in enumerate(zip(trees, pad)):
        ids[r, left:] = torch.tensor(tree.ids[lead:])
        positions[r, left:] = torch.tensor(tree.positions[lead:])
        media += encoder.tensors(tree.row)
        wanted += [(r, place) for place in tree.predicting]
    at = [(r, pad[r] + place - lead) for r, place in wanted]
    where = torch.tensor(at, device=device).T
    inputs = {key: value.to(device) for key, value in join(media).items()}
    if lead:
        # The head sees one position only; this forward is for its cache.
        with logits_only_at(model, torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long)):
            begun = model(input_ids=torch.tensor([trees[0].ids[:lead]], device=device), use_cache=True)
        begun.past_key_values.batch_repeat_interleave(len(trees))
        inputs["past_key_values"] = begun.past_key_values
    with ExitStack() as stack:
        stack.enter_context(logits_only_at(model, *where))
        numbers = {n for tap in taps for n in inside.tap_layers(tap)} | set(states)
        captured = stack.enter_context(inside.states_at(sorted(numbers), *where)) if numbers else Captured()
        if changed:
            stack.enter_context(inside.changed(_frame(trees, pad)))
        out = model(
            input_ids=ids.to(device),
            attention_mask=_mask(trees, lead, pad, length, dtype, changed).to(device),
            position_ids=positions.to(device),
            use_cache=use_cache or bool(lead),
            **inputs,
        )
    index = {place: i for i, place in enumerate(wanted)}
    return Prefilled(trees, lead, pad, out.logits[0], index, captured, out.past_key_values if use_cache else None)


def _lead(trees: list[Tree]) -> int:
    """How many tokens all rows begin with, before any media and inside the first segment of each; 0 if too few."""
    if len(trees) == 1:
        return 0
    limit = min(len(tree.ids) for tree in trees) - 1
    for tree in trees:
        own = tree.segments.count(0) - (len(tree.ancestors) == 1)
        limit = min(limit, tree.row.media_places[0] if tree.row.media_places else own, own)
    limit = min(limit, _common([tree.ids for tree in trees]))
    return limit if limit >= _MIN_SHARED and min(min(tree.predicting) for tree in trees) >= limit else 0


def _frame(trees: list[Tree], pad: list[int]) -> Frame:
    media = [[left + p for p in tree.row.media_places] for tree, left in zip(trees, pad)]
    queries = [[left + p for p in tree.predicting] for tree, left in zip(trees, pad)]
    return Frame([tree.row for tree in trees], media, queries, media)


def _mask(trees: list[Tree], lead: int, pad: list[int], length: int, dtype: torch.dtype, dense: bool) -> Tensor:
    """[rows, length] of ones and zeros if all trees are plain prompts, else additive [rows, 1, length - lead, length].

    Padding lies between the ``lead`` common tokens and a row's own.
    """
    if all(tree.linear for tree in trees) and not dense:
        mask = torch.ones(len(trees), length, dtype=torch.long)
        for r, left in enumerate(pad):
            mask[r, lead : lead + left] = 0
        return mask
    # Padding sees itself, so that no row of the mask is empty.
    allowed = torch.eye(length, dtype=torch.bool).repeat(len(trees), 1, 1)
    for r, (tree, left) in enumerate(zip(trees, pad)):
        own = tree.mask()
        allowed[r, lead + left :, lead + left :] = own[lead:, lead:]
        allowed[r, lead + left :, :lead] = own[lead:, :lead]
    # An additive float mask: a 0/1 float mask would silently be added as it is.
    return torch.where(allowed[:, lead:], 0.0, torch.finfo(dtype).min).to(dtype)[:, None]


def _pad_id(encoder: PromptEncoder) -> int:
    token = getattr(encoder.tokenizer, "pad_token_id", None)
    # A media placeholder as padding would ask the model for more media than there are.
    return token if token is not None and token not in encoder.placeholder_ids.values() else 0
