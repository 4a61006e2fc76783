"""The core alignment objectives: InfoNCE, SigLIP, and the alignment of tokens with an LLM's own word embeddings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mmllm.align.scorers  # noqa: F401  (registers the core scorers)
from mmllm.align.matching import assigned_things
from mmllm.blocks.tiled_contrast import contrast, tiled_sigmoid
from mmllm.blocks.tiles import diagonal
from mmllm.contracts import AlignBatch, Objective, Scorer
from mmllm.errors import UserError
from mmllm.registry import make, register


class PairObjective(Objective):
    """Base of losses on the similarities of two streams; of items that lack one of them neither row takes part.

    Each item has the mean of the losses of its rows (captions), half for either direction.

    Args:
        pair: the two streams.
        same_label: items with the same label count as positives of each other, instead of as negatives.
        scorer: what says how alike two items are, see ``mmllm.align.scorers``.
    """

    def __init__(self, pair: Sequence[str], same_label: bool = True, scorer: str | dict[str, Any] = "cosine"):
        super().__init__()
        if len(pair) != 2:
            raise UserError(f"pair must name two streams (got {list(pair)})")
        self.pair, self.same_label = tuple(pair), same_label
        self.scorer: Scorer = make("scorer", scorer, "scorer")
        self.needs = frozenset(f"{s}.{what}" for s in pair for what in self.scorer.needs)
        # Tokens are as many as the longest text of each process, so only gathered (and padded) do they fit together.
        self.gathered = self.scorer.needs != {"embedding"}

    @property
    def pair_name(self) -> str:
        return ":".join(self.pair)

    def loss(self, rows: Any, cols: Any, batch: AlignBatch, *, target_fn: Any, symmetric: bool, **how: Any) -> Tensor:
        """Loss of each row against all columns, [R]; with ``symmetric`` the mean of both directions.

        Args:
            target_fn: which pairs belong together, see ``mmllm.blocks.tiled_contrast.contrast``.
            how: ``score_fn`` and ``ranks``, handed on.
        """
        raise NotImplementedError

    def forward(self, batch: AlignBatch) -> dict[str, Tensor]:
        size = len(batch)
        (rows, own), (cols, theirs) = (self._rows(batch, s) for s in self.pair)
        if own is None and theirs is None:
            return {"loss": self._both(rows, cols, batch, self._targets(batch, None, None))}
        device = (own if own is not None else theirs).device  # type: ignore[union-attr]
        everyone = torch.arange(size, device=device)
        own, theirs = (everyone if o is None else o for o in (own, theirs))
        paired = torch.isin(everyone, own) & torch.isin(everyone, theirs)
        (rows, own), (cols, theirs) = (_kept(x, o, paired[o]) for x, o in ((rows, own), (cols, theirs)))
        if not paired.any():
            return {"loss": batch.logit_scale[self.pair_name] * everyone.float() * 0.0, "valid": paired}
        forth = self._one(rows, cols, batch, self._targets(batch, own, theirs))
        back = self._one(cols, rows, batch, self._targets(batch, theirs, own))
        loss = 0.5 * (_item_means(forth, own, size) + _item_means(back, theirs, size))
        return {"loss": loss, "valid": paired}

    def _rows(self, batch: AlignBatch, name: str) -> tuple[Any, Tensor | None]:
        return self.scorer.rows(batch.streams[name]), batch.streams[name].owner

    def _both(self, rows: Any, cols: Any, batch: AlignBatch, targets: Any) -> Tensor:
        if self.scorer.symmetric:
            return self._one(rows, cols, batch, targets, symmetric=True)
        return 0.5 * (self._one(rows, cols, batch, targets) + self._one(cols, rows, batch, targets))

    def _one(self, rows: Any, cols: Any, batch: AlignBatch, targets: Any, symmetric: bool = False) -> Tensor:
        plain = type(self.scorer).score is Scorer.score and isinstance(rows, Tensor)
        fn = None if plain else self.scorer.score
        return self.loss(rows, cols, batch, target_fn=targets, symmetric=symmetric, score_fn=fn, ranks=batch.ranks)

    def _targets(self, batch: AlignBatch, own: Tensor | None, theirs: Tensor | None) -> Any:
        """The pairs of one item, or of one label; of all processes where there are several."""
        names = batch.label_ids if self.same_label else None
        if names is None and self.same_label and batch.labels is not None:
            number = {label: i for i, label in enumerate(dict.fromkeys(batch.labels))}
            names = torch.tensor([number[label] for label in batch.labels])
        if own is None or theirs is None:
            if names is None:
                return diagonal
            names = names if batch.ranks is None else batch.ranks.gather(names)
            return lambda i, j: names[i][:, None] == names[j][None]
        if names is None:
            return lambda i, j: own[i][:, None] == theirs[j][None]
        a, b = names.to(own.device)[own], names.to(own.device)[theirs]
        return lambda i, j: a[i][:, None] == b[j][None]


def _kept(rows: Any, owner: Tensor, keep: Tensor) -> tuple[Any, Tensor]:
    """The rows (a tensor or a tuple of them) and owners that ``keep`` [N] marks."""
    return rows[keep] if isinstance(rows, Tensor) else tuple(x[keep] for x in rows), owner[keep]


def _item_means(values: Tensor, owner: Tensor, size: int) -> Tensor:
    """[size]: the mean of the values of each owner, 0 where it has none."""
    total = values.new_zeros(size).index_add(0, owner, values)
    return total / torch.bincount(owner, minlength=size).clamp(min=1)


@register("objective", "infonce")
class InfoNCE(PairObjective):
    """Symmetric InfoNCE with a learned temperature (CLIP, arXiv 2103.00020); soft over items of one label."""

    def __init__(
        self,
        pair: Sequence[str],
        same_label: bool = True,
        label_smoothing: float = 0.0,
        scorer: str | dict[str, Any] = "cosine",
    ):
        super().__init__(pair, same_label, scorer)
        self.label_smoothing = label_smoothing

    def loss(self, rows: Any, cols: Any, batch: AlignBatch, **how: Any) -> Tensor:
        scale = batch.logit_scale[self.pair_name]
        return contrast(rows, cols, scale=scale, label_smoothing=self.label_smoothing, **how)


@register("objective", "siglip")
class SigLIP(PairObjective):
    """Sigmoid loss of every pair (arXiv 2303.15343), with learned temperature (from 10) and bias (from -10)."""

    initial_scale, initial_bias = math.log(10.0), -10.0

    def loss(self, rows: Any, cols: Any, batch: AlignBatch, *, symmetric: bool, **how: Any) -> Tensor:
        name = self.pair_name  # one sum over all pairs, so there is no second direction to a symmetric score
        return tiled_sigmoid(rows, cols, scale=batch.logit_scale[name], bias=batch.logit_bias[name], **how)


@register("objective", "region_align")
class RegionAlign(Objective):
    """Each token of a stream is classified among the LLM's word embeddings by scaled cosine similarity.

    A grid cell whose centre lies in a box aims at the box's word, as does the cell of each box's own centre; other
    cells aim at a learned background vector. Of tokens on no grid (queries, latents) one is assigned to each box, see
    ``mmllm.align.matching``. An item without boxes aims all its tokens at its label. Similarities are taken around the
    mean word embedding, since the embeddings of an LLM share a large common part. Vocabulary:
    ``batch.extras["vocabulary"] = {"index": {name: i}, "embedding": [V, D]}``.

    Args:
        stream: whose ``token_embedding`` is aligned.
        dim: width of the word embeddings.
        scale: factor on the cosine.
        background_weight: weight of background cells in the mean.
        norm_weight: weight of the term that keeps the tokens as long as word embeddings are.
        pull_weight: weight of 1 - cosine to the right word. The classification is content when a token is nearer to its
            word than to others; pulled all the way it is a word that the LLM knows from text.
    """

    def __init__(
        self,
        stream: str,
        dim: int,
        scale: float = 20.0,
        background_weight: float = 0.2,
        norm_weight: float = 0.05,
        pull_weight: float = 0.0,
    ):
        super().__init__()
        self.stream, self.scale = stream, scale
        self.background_weight, self.norm_weight = background_weight, norm_weight
        self.pull_weight = pull_weight
        self.needs = frozenset({f"{stream}.token_embedding", "vocabulary"})
        self.background = nn.Parameter(torch.randn(dim) * 0.02)

    def targets(self, batch: AlignBatch, words: Tensor, index: dict[str, int]) -> Tensor:
        """Word index of every token, [B, M]; V means background."""
        stream = batch.streams[self.stream]
        tokens, grid = stream.token_embedding, stream.grid
        assert tokens is not None
        count, boxes = tokens.shape[1], batch.boxes
        if grid is not None and boxes is not None:
            return torch.stack([box_targets(things, grid[1:], index) for things in boxes])
        held = boxes or [[] for _ in range(len(tokens))]
        owner = assigned_things(tokens, stream.token_mask, words, index, held).cpu() if any(held) else None
        rows = []
        for i, things in enumerate(held):
            if things and owner is not None:
                names = [index[t["text"]] for t in things]
                rows.append(torch.tensor([*names, len(index)])[owner[i]])  # -1 is the last one, background
            else:
                rows.append(torch.full((count,), index[batch.labels[i]] if batch.labels else len(index)))
        return torch.stack(rows)

    def forward(self, batch: AlignBatch) -> dict[str, Tensor]:
        tokens, mask = batch.streams[self.stream].token_embedding, batch.streams[self.stream].token_mask
        assert tokens is not None and mask is not None
        vocabulary = batch.extras["vocabulary"]
        words = vocabulary["embedding"].to(tokens)
        logits, length = self.logits(tokens, words)
        target = self.targets(batch, words, vocabulary["index"]).to(tokens.device)
        weight = torch.ones(len(words) + 1, device=tokens.device)
        weight[-1] = self.background_weight
        each = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view(target.shape)
        share = weight[target] * mask
        match = (each * share).sum() / share.sum().clamp(min=1e-6)
        norm = ((length - 1).pow(2) * mask).sum() / mask.sum().clamp(min=1)
        named = mask & (target < len(words))
        hit = (logits.argmax(-1) == target) & named
        count = named.sum().clamp(min=1)
        cosine = (logits / self.scale).gather(-1, target[..., None])[..., 0]
        pull = ((1 - cosine) * named).sum() / count
        loss = match + self.norm_weight * norm + self.pull_weight * pull
        return {"loss": loss, "word_accuracy": (hit.sum() / count).float(), "word_cosine": 1 - pull.detach()}

    def logits(self, tokens: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        """tokens [B, M, D], words [V, D] -> logits [B, M, V + 1] and relative length [B, M] (1 = as a word)."""
        centre = words.mean(0)
        around = words - centre
        table = torch.cat([F.normalize(around, dim=-1), F.normalize(self.background, dim=0)[None].to(words)])
        offset = tokens - centre
        return self.scale * F.normalize(offset, dim=-1) @ table.T, offset.norm(dim=-1) / around.norm(dim=-1).mean()


def box_targets(boxes: list[dict[str, Any]], grid: tuple[int, ...], index: dict[str, int]) -> Tensor:
    """Word index per cell of a grid, row by row; ``len(index)`` is background. Later boxes lie on top."""
    rows, columns = grid
    target = np.full((rows, columns), len(index))  # numpy: each torch call on so little takes longer than all of it
    for box in boxes:
        x0, y0, x1, y1 = box["xyxy"]
        # First and past-the-last cell whose centre (c + 0.5) / n lies in [low, high).
        c0, c1 = math.ceil(x0 * columns - 0.5), math.ceil(x1 * columns - 0.5)
        r0, r1 = math.ceil(y0 * rows - 0.5), math.ceil(y1 * rows - 0.5)
        target[max(r0, 0) : max(r1, 0), max(c0, 0) : max(c1, 0)] = index[box["text"]]
    for box in boxes:
        row, column = centre_cell(box["xyxy"], grid)
        target[row, column] = index[box["text"]]
    return torch.from_numpy(target.ravel())


def centre_cell(xyxy: list[float], grid: tuple[int, ...]) -> tuple[int, int]:
    """(row, column) of the cell that holds a box's centre."""
    rows, columns = grid
    column = min(columns - 1, int((xyxy[0] + xyxy[2]) / 2 * columns))
    return min(rows - 1, int((xyxy[1] + xyxy[3]) / 2 * rows)), column
