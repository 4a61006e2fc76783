"""Multi-level Matching Network for Multimodal Entity Linking (arXiv 2412.10440).

slug: m3el-multilevel-matching
number: 44
shelf: 1
kind: objective
config: |
  objectives: [{type: m3el, options: {pairs: [[image, image@entity], [text, text@entity]]}}]
left_out: the Wikidata benchmarks; the bidirectional variant gates both directions instead of joining their tokens.
differs: "the released loss gives the excluded similarity of an item to itself the logit 0 instead of none."
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmllm.blocks.common_rows import common_rows
from mmllm.blocks.pooling import masked_mean
from mmllm.contracts import AlignBatch, DataRecipe, Objective
from mmllm.data.captions import label_of
from mmllm.errors import UserError
from mmllm.registry import register

POOLED_AT = (2.0, 2.5, 3.5, 4.5)  # and at infinity, the maximum (section 4.3)


@register("objective", "m3el")
class M3EL(Objective):
    """Links mentions to entities by the scores of several levels, and contrasts each modality within and across.

    Args:
        pairs: for each modality the mention's and the entity's stream; two of them also match across modalities, the
            second (text) asking the first (vision).
        matching: the learned matching scores (sections 4.2 and 4.3), a cross-entropy over entities for each of them and
            for their mean.
        contrast: weight of the intra-modal contrast of the embeddings (section 4.1).
        temperature: of that contrast.
        across, within: factors on its logits between the two sides and inside one side; within None: no negatives of
            the own side, which is InfoNCE.
        width: of the matching.
        both: also match from the first modality to the second.
        same_label: items of one label are no negatives of each other.
    """

    def __init__(
        self,
        pairs: Sequence[Sequence[str]],
        matching: bool = True,
        contrast: float = 1.0,
        temperature: float = 0.03,
        across: float = 1.0,
        within: float | None = 0.8,
        width: int = 96,
        both: bool = False,
        same_label: bool = True,
    ):
        super().__init__()
        if not 1 <= len(pairs) <= 2 or any(len(p) != 2 for p in pairs):
            raise UserError(f"pairs must be one or two pairs of streams (got {list(pairs)})", "objective 'm3el'")
        if temperature <= 0:
            raise UserError(f"temperature must be above 0 (got {temperature})", "objective 'm3el'")
        self.pairs, self.matching, self.contrast = [tuple(p) for p in pairs], matching, contrast
        self.temperature, self.across, self.within = temperature, across, within
        self.width, self.both, self.same_label = width, both, same_label
        kinds = {"embedding"} if contrast else set()
        kinds |= {"tokens", "pooled"} if matching else set()
        self.needs = frozenset(f"{s}.{k}" for p in pairs for s in p for k in kinds)
        self.levels = nn.ModuleList()
        self.crossings = nn.ModuleList()

    def setup(self, model: Any) -> None:
        if not self.matching:
            return
        for mention, entity in self.pairs:
            one, other = (model.tower(s) for s in (mention, entity))
            if (one.pooled_size, one.hidden_size) != (other.pooled_size, other.hidden_size):
                raise UserError(f"the towers of '{mention}' and '{entity}' differ in width", "objective 'm3el'")
            self.levels.append(IntraModal(one.pooled_size, one.hidden_size, self.width))
        if len(self.pairs) == 2:
            self.crossings.extend(CrossModal(self.width) for _ in range(2 if self.both else 1))

    def forward(self, batch: AlignBatch) -> dict[str, Tensor]:
        rows, items = common_rows(batch, [s for p in self.pairs for s in p])
        size, device = len(batch), items.device
        valid = torch.zeros(size, dtype=torch.bool, device=device)
        valid[items] = True
        names = batch.label_ids[items.cpu()].to(device) if batch.label_ids is not None else None
        rival = torch.ones(len(items), len(items), dtype=torch.bool, device=device)
        if self.same_label and names is not None:
            rival = names[:, None] != names[None]
        rival.fill_diagonal_(False)
        each = torch.zeros(len(items), device=device)
        if self.contrast:
            for pair in self.pairs:
                a, b = (batch.streams[s].embedding[rows[s]] for s in pair)  # type: ignore[index]
                one = self.intra_contrast(a, b, rival) + self.intra_contrast(b, a, rival)
                each = each + self.contrast * one / (2 * len(self.pairs))
        if self.matching:
            for score in self.scores(batch, rows):
                each = each + link(score, rival)
        return {"loss": each.new_zeros(size).index_add(0, items, each), "valid": valid}

    def intra_contrast(self, a: Tensor, b: Tensor, rival: Tensor) -> Tensor:
        """``log sum_j e^(w1 a_i b_j / t) + sum_j e^(w2 a_i a_j / t)`` less the pair's own logit, [B] (equation 4).

        Args:
            a, b: unit vectors [B, P].
            rival: [B, B] bool, who is a negative of whom; nobody of himself.
        """
        forth = self.across * a @ b.T / self.temperature
        kept = rival | torch.eye(len(a), dtype=torch.bool, device=a.device)
        parts = [forth.masked_fill(~kept, -torch.inf)]
        if self.within is not None:
            parts.append((self.within * a @ a.T / self.temperature).masked_fill(~rival, -torch.inf))
        return torch.cat(parts, 1).logsumexp(1) - forth.diagonal()

    def scores(self, batch: AlignBatch, rows: dict[str, Tensor]) -> list[Tensor]:
        """The mean of all scores, and each of them: [mentions, entities]."""
        sides: list[list[tuple[Tensor, Tensor, Tensor]]] = [[], []]
        found = []
        for level, pair in zip(self.levels, self.pairs):
            for side, stream in zip(sides, pair):
                f = batch.streams[stream].features
                assert f is not None
                at = rows[stream]
                side.append(level.project(f.pooled[at], f.tokens[at], f.mask[at]))  # type: ignore[operator]
            found.append(level(sides[0][-1], sides[1][-1]))
        for k, crossing in enumerate(self.crossings):
            m, e = (crossing(*(side if k else side[::-1])) for side in sides)  # text asks vision first
            found.append(m @ e.T)
        return [torch.stack(found).mean(0), *found]


def link(score: Tensor, rival: Tensor) -> Tensor:
    """Cross-entropy of each mention's own entity against its rivals, [B]."""
    kept = rival | torch.eye(len(score), dtype=torch.bool, device=score.device)
    return score.masked_fill(~kept, -torch.inf).logsumexp(1) - score.diagonal()


class IntraModal(nn.Module):
    """Whole to whole and whole to parts of one modality; mention and entity go through the same layers."""

    def __init__(self, pooled: int, tokens: int, width: int):
        super().__init__()
        self.whole = nn.Sequential(nn.Linear(pooled, width), nn.LayerNorm(width))
        self.parts = nn.Sequential(nn.Linear(tokens, width), nn.LayerNorm(width))
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.asks, self.norm = nn.Linear(width, width), nn.LayerNorm(width)

    def project(self, pooled: Tensor, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, d], [B, N, d] and the mask."""
        return self.whole(pooled), self.parts(tokens), mask

    def forward(self, mention: tuple[Tensor, Tensor, Tensor], entity: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """(whole, parts, mask) of M mentions and E entities -> the mean of both scores, [M, E]."""
        (m, _, _), (e, _, _) = mention, entity
        return (m @ e.T + self.global_to_local(mention, entity)) / 2

    def global_to_local(
        self, mention: tuple[Tensor, Tensor, Tensor], entity: tuple[Tensor, Tensor, Tensor]
    ) -> Tensor:
        """The entity's parts look at the mention's parts; the mean of what they find against the whole entity."""
        (_, m_parts, m_mask), (e, e_parts, e_mask) = mention, entity
        logits = torch.einsum("eqd,mkd->meqk", self.query(e_parts), self.key(m_parts)) / e.shape[-1] ** 0.5
        looks = logits.masked_fill(~m_mask[:, None, None], torch.finfo(logits.dtype).min).softmax(-1)
        looks = masked_mean(looks, e_mask[None].expand(len(m_parts), -1, -1))  # before the values: the mean is linear
        seen = torch.einsum("mek,mkd->med", looks, self.value(m_parts))
        return (self.norm(seen) * self.asks(e)).sum(-1)


class CrossModal(nn.Module):
    """What one modality of an item finds in the other, as one vector."""

    def __init__(self, width: int):
        super().__init__()
        self.shared = nn.Linear(width, width)
        self.gate_own, self.gate_other = nn.Linear(width, width), nn.Linear(width, width)
        self.keep, self.norm = nn.Linear(width, width), nn.LayerNorm(width)

    def find(self, p: Tensor, q: Tensor, mask: Tensor | None = None) -> Tensor:
        """``relu(W softmax(p (W q)^T) q)``: [B, N, d], [B, K, d], mask [B, K] -> [B, N, d]."""
        logits = p @ self.shared(q).transpose(1, 2)
        if mask is not None:
            logits = logits.masked_fill(~mask[:, None], torch.finfo(logits.dtype).min)
        return F.relu(self.shared(logits.softmax(-1) @ q))

    def forward(self, asking: tuple[Tensor, Tensor, Tensor], asked: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """(whole, parts, mask) of the modality that asks and of the one that is asked -> [B, d]."""
        (whole, _, _), (_, parts, mask) = asking, asked
        own = self.find(whole[:, None], parts, mask)[:, 0]
        other = many_temperatures(self.find(parts, whole[:, None]), mask)
        share = torch.sigmoid(self.gate_own(own) + self.gate_other(other))
        return self.norm(own * share + other * (1 - share) + torch.tanh(self.keep(whole)) * whole)


def many_temperatures(x: Tensor, mask: Tensor, weight: float = 1.0) -> Tensor:
    """Mean over temperatures of ``mean_n x + weight * sum_n softmax(T x)_n x_n``; [B, N, d], [B, N] -> [B, d]."""
    mean = masked_mean(x, mask)
    low = torch.finfo(x.dtype).min
    held = x.masked_fill(~mask[..., None], 0.0)
    sharp = [((t * x).masked_fill(~mask[..., None], low).softmax(1) * held).sum(1) for t in POOLED_AT]
    sharp.append(x.masked_fill(~mask[..., None], low).amax(1))
    return mean + weight * torch.stack(sharp).mean(0)


@register("data_recipe", "mention_entity")
class MentionEntity(DataRecipe):
    """Of each label one picture becomes the entity's: the others are mentions, with the entity's picture as ``video``.

    A stream of modality ``video`` with ``frames: 1`` then reads the entity. Labels with one picture are left out.
    """

    def apply(self, records: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        entity: dict[str, Any] = {}
        for record in records:
            if not record.get("image"):
                continue
            held = entity.setdefault(label_of(record), record["image"])
            if held is not record["image"]:
                yield {**record, "video": [held]}
