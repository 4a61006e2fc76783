"""From Unimodal to Multimodal: Scaling up Projectors to Align Modalities (arXiv 2409.19425).

slug: freeze-align-projectors
number: 42
shelf: 1
kind: connector
config: |
  streams:
    image: {connector: {type: token_projector}}
    text: {connector: {type: token_projector, residual_head: true}}
  phases:
    both:
      objectives: [{type: infonce, options: {pair: [image, text], scorer: late_interaction}}]
left_out: the 20 million curated pairs, and the projectors' size of 1024. The pair of encoders is chosen by the measure
  encoder_cka, and captions are collected by the data recipe concept_balanced.
differs: the released training file also names a token-level loss, whose weight is 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmllm.align.reading import FIELD
from mmllm.blocks.pooling import masked_mean
from mmllm.connectors.base import FolderConnector
from mmllm.contracts import DataRecipe, Features
from mmllm.data.captions import captions_of, label_of
from mmllm.errors import UserError
from mmllm.evaluate.geometry import linear_cka
from mmllm.registry import register
from mmllm.report.figures import Figure

if TYPE_CHECKING:
    from mmllm.align.config import MeasureConfig
    from mmllm.train.align import AlignStage


class TokenProjector(nn.Module):
    """``W1 u + W3 gelu(W2 u)`` with ``u = dropout(norm(x))``, on every token (section 3.2)."""

    def __init__(self, in_dim: int, out_dim: int, dropout: float):
        super().__init__()
        self.norm, self.dropout = nn.LayerNorm(in_dim), nn.Dropout(dropout)
        self.straight = nn.Linear(in_dim, out_dim)
        self.into, self.out = nn.Linear(in_dim, out_dim), nn.Linear(out_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_dim] -> [..., out_dim]."""
        u = self.dropout(self.norm(x))
        return self.straight(u) + self.out(F.gelu(self.into(u)))


@register("connector", "token_projector")
class TokenProjectorConnector(FolderConnector):
    """A head on all tokens: the mean of the projected tokens, as one token, which is the item's embedding.

    With ``scorer: late_interaction`` one token for each side is compared by its cosine.

    Args:
        class_token: adds the projected class token, by a projector of its own; a tower on a grid without class token
            gives its pooled output. Towers without a grid have all tokens in the mean and no class token.
        residual_head: ``norm(h + dropout(W gelu(h)))`` with a linear ``h`` of the mean (the text side in the paper).
    """

    def __init__(
        self, in_dim: int, out_dim: int, dropout: float = 0.1, class_token: bool = True, residual_head: bool = False
    ):
        options = {"dropout": dropout, "class_token": class_token, "residual_head": residual_head}
        super().__init__("token_projector", in_dim, out_dim, **options)
        self.local = TokenProjector(in_dim, out_dim, dropout)
        self.whole = TokenProjector(in_dim, out_dim, dropout) if class_token and not residual_head else None
        self.first = self.second = self.norm = None
        if residual_head:
            self.first, self.second = nn.Linear(out_dim, out_dim), nn.Linear(out_dim, out_dim)
            self.norm, self.dropout = nn.LayerNorm(out_dim), nn.Dropout(dropout)

    def forward(self, features: Features, text: Features | None = None) -> tuple[Tensor, Tensor]:
        """One token, [B, 1, out_dim], for every item that has any."""
        tokens, mask = self.content(features)
        made = masked_mean(self.local(tokens), mask)
        if self.whole is not None and features.grid is not None:
            made = made + self.whole(features.tokens[:, 0] if features.num_prefix else features.pooled.to(tokens.dtype))
        if self.first is not None and self.second is not None and self.norm is not None:
            h = self.first(made)
            made = self.norm(h + self.dropout(self.second(F.gelu(h))))
        return made[:, None], mask.any(1, keepdim=True)

    def num_tokens(self, grid_or_length: Any) -> int:
        return 1


@register("measure", "encoder_cka")
@torch.no_grad()
def encoder_cka(stage: AlignStage, measure: MeasureConfig, records: list[dict[str, Any]]) -> list[Figure]:
    """Linear CKA of the pooled features of every two of the measure's streams, before any projection (section 3.1).

    The pair of encoders with the most of it is the one to align. Records that lack a stream take no part; of several
    texts the first counts.
    """
    from mmllm.align.model import pooled_texts

    fields = {s: FIELD[stage.model.tower(s).modality] for s in measure.streams}
    held = [r for r in records if all(captions_of(r) if f == "text" else r.get(f) for f in fields.values())]
    rows = {}
    for stream, field in fields.items():
        tower = stage.model.tower(stream)
        if field == "text":
            rows[stream] = pooled_texts(tower, [captions_of(r)[0][1] for r in held])
            continue
        size = measure.image_size or stage.model.image_size.get(stream)
        found = stage.frozen(tower, held, ["pooled"], image_size=size, name=measure.name, frames=measure.frames)
        rows[stream] = found["pooled"][0].float()
    out = []
    for a, b in combinations(measure.streams, 2):
        control = linear_cka(rows[a], rows[b].roll(1, 0))
        value = linear_cka(rows[a], rows[b])
        out.append(Figure(f"{measure.name}_{a}_{b}", value, "higher", n=len(held), unit="cka", control=control))
    return out


@register("data_recipe", "concept_balanced")
class ConceptBalanced(DataRecipe):
    """Keeps for each concept the records that fit it best, rare concepts first (section 3.3).

    Every record's first text is scored against each concept's text by the cosine of a text tower's features; each
    concept keeps the ``longlist`` best, and takes, in the order of the mean score of these, its first ``per_concept``
    that are not taken yet.

    Args:
        per_concept: records of each.
        concepts: their texts; None: all labels of the records.
        longlist: records that a concept may choose from; None: four times ``per_concept``.
        model: the text tower that scores.
        uniform: draws as many records at random instead, by ``seed``.
    """

    def __init__(
        self,
        per_concept: int,
        concepts: Sequence[str] | None = None,
        longlist: int | None = None,
        model: str = "starter:all-minilm-l6-v2",
        uniform: bool = False,
        seed: int = 0,
    ):
        if per_concept < 1:
            raise UserError("per_concept must be at least 1", "data recipe 'concept_balanced'")
        self.per_concept, self.concepts, self.model = per_concept, concepts, model
        self.longlist, self.uniform, self.seed = longlist or 4 * per_concept, uniform, seed

    def apply(self, records: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        held = [r for r in records if captions_of(r)]
        concepts = sorted({label_of(r) for r in held}) if self.concepts is None else list(self.concepts)
        features = self.features([*concepts, *(captions_of(r)[0][1] for r in held)])
        chosen = collect(features[len(concepts) :] @ features[: len(concepts)].T, self.per_concept, self.longlist)
        picked = sorted(i for rows in chosen for i in rows)
        if self.uniform:
            generator = torch.Generator().manual_seed(self.seed)
            picked = sorted(torch.randperm(len(held), generator=generator)[: len(picked)].tolist())
        yield from (held[i] for i in picked)

    def features(self, texts: list[str]) -> Tensor:
        """Unit vectors [N, D] of texts."""
        from mmllm.align.model import pooled_texts
        from mmllm.data.models import resolve_model
        from mmllm.towers import load_tower

        tower = load_tower(resolve_model(self.model), "text")
        return F.normalize(pooled_texts(tower, texts), dim=-1)


def collect(scores: Tensor, per_concept: int, longlist: int) -> list[list[int]]:
    """For each concept the items that it takes, best first; no item is taken twice.

    Args:
        scores: [N, C] of items for concepts. The concept whose ``longlist`` has the lowest mean score chooses first.
    """
    best, index = scores.topk(min(longlist, len(scores)), 0)
    taken: set[int] = set()
    chosen: list[list[int]] = [[] for _ in range(scores.shape[1])]
    for concept in best.mean(0).argsort(stable=True).tolist():
        chosen[concept] = [i for i in index[:, concept].tolist() if i not in taken][:per_concept]
        taken.update(chosen[concept])
    return chosen
