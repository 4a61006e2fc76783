"""The core alignment objectives: InfoNCE, SigLIP, and the alignment of tokens with an LLM's own word embeddings."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmllm.blocks.contrast import sigmoid_contrast, symmetric_infonce
from mmllm.contracts import AlignBatch, Objective
from mmllm.errors import UserError
from mmllm.registry import register


def label_positives(labels: list[str] | None) -> Tensor | None:
    """[B, B] bool of equal labels, or None when all labels differ (the diagonal alone)."""
    if labels is None or len(set(labels)) == len(labels):
        return None
    number = {name: i for i, name in enumerate(dict.fromkeys(labels))}
    index = torch.tensor([number[name] for name in labels])
    return index[:, None] == index[None]


class PairObjective(Objective):
    """Base of losses on the similarities of two streams' embeddings.

    Args:
        pair: the two streams.
        same_label: items with the same label count as positives of each other, instead of as negatives.
    """

    def __init__(self, pair: list[str] | tuple[str, str], same_label: bool = True):
        super().__init__()
        if len(pair) != 2:
            raise UserError(f"pair must name two streams (got {list(pair)})")
        self.pair, self.same_label = tuple(pair), same_label
        self.needs = frozenset(f"{s}.embedding" for s in pair)

    @property
    def pair_name(self) -> str:
        return ":".join(self.pair)

    def similarities(self, batch: AlignBatch) -> tuple[Tensor, Tensor | None]:
        """Scaled cosine similarities [B, B] and the mask of positives (None: the diagonal)."""
        a, b = (batch.streams[s].embedding for s in self.pair)
        assert a is not None and b is not None
        logits = batch.logit_scale[self.pair_name] * a @ b.T
        positive = label_positives(batch.labels) if self.same_label else None
        return logits, None if positive is None else positive.to(logits.device)


@register("objective", "infonce")
class InfoNCE(PairObjective):
    """Symmetric InfoNCE with a learned temperature (CLIP, arXiv 2103.00020); soft over items of one label."""

    def __init__(self, pair: list[str] | tuple[str, str], same_label: bool = True, label_smoothing: float = 0.0):
        super().__init__(pair, same_label)
        self.label_smoothing = label_smoothing

    def forward(self, batch: AlignBatch) -> dict[str, Tensor]:
        logits, positive = self.similarities(batch)
        return {"loss": symmetric_infonce(logits, positive, self.label_smoothing)}


@register("objective", "siglip")
class SigLIP(PairObjective):
    """Sigmoid loss of every pair (arXiv 2303.15343), with learned temperature (from 10) and bias (from -10)."""

    initial_scale, initial_bias = math.log(10.0), -10.0

    def forward(self, batch: AlignBatch) -> dict[str, Tensor]:
        logits, positive = self.similarities(batch)
        return {"loss": sigmoid_contrast(logits + batch.logit_bias[self.pair_name], positive)}


@register("objective", "region_align")
class RegionAlign(Objective):
    """Each token of a stream is classified among the LLM's word embeddings by scaled cosine similarity.

    A grid cell whose centre lies in a box aims at the box's word, as does the cell of each box's own centre; other
    cells aim at a learned background vector. An item without boxes aims all its tokens at its label. Similarities are
    taken around the mean word embedding, since the embeddings of an LLM share a large common part. Vocabulary:
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

    def targets(self, batch: AlignBatch, count: int, index: dict[str, int]) -> Tensor:
        """Word index of every token, [B, M]; V means background."""
        features = batch.streams[self.stream].features
        assert features is not None
        rows = []
        for i in range(len(features.tokens)):
            boxes = batch.boxes[i] if batch.boxes is not None else None
            if boxes is not None and features.grid is not None:
                rows.append(box_targets(boxes, features.grid[1:], index))
            else:
                rows.append(torch.full((count,), index[batch.labels[i]] if batch.labels else len(index)))
        return torch.stack(rows)

    def forward(self, batch: AlignBatch) -> dict[str, Tensor]:
        tokens, mask = batch.streams[self.stream].token_embedding, batch.streams[self.stream].token_mask
        assert tokens is not None and mask is not None
        vocabulary = batch.extras["vocabulary"]
        words = vocabulary["embedding"].to(tokens)
        logits, length = self.logits(tokens, words)
        target = self.targets(batch, tokens.shape[1], vocabulary["index"]).to(tokens.device)
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
    target = torch.full((rows, columns), len(index))
    for box in boxes:
        x0, y0, x1, y1 = box["xyxy"]
        # First and past-the-last cell whose centre (c + 0.5) / n lies in [low, high).
        c0, c1 = math.ceil(x0 * columns - 0.5), math.ceil(x1 * columns - 0.5)
        r0, r1 = math.ceil(y0 * rows - 0.5), math.ceil(y1 * rows - 0.5)
        target[max(r0, 0) : max(r1, 0), max(c0, 0) : max(c1, 0)] = index[box["text"]]
    for box in boxes:
        row, column = centre_cell(box["xyxy"], grid)
        target[row, column] = index[box["text"]]
    return target.flatten()


def centre_cell(xyxy: list[float], grid: tuple[int, ...]) -> tuple[int, int]:
    """(row, column) of the cell that holds a box's centre."""
    rows, columns = grid
    column = min(columns - 1, int((xyxy[0] + xyxy[2]) / 2 * columns))
    return min(rows - 1, int((xyxy[1] + xyxy[3]) / 2 * rows)), column
