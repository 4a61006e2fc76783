"""Improved baselines for vision-language pre-training (arXiv 2305.08675).

slug: clip-rocket
number: 7
shelf: 1
kind: objective
config: "objectives: [{type: clip_rocket, options: {pair: [image, text]}}]  # towers that train, or cache: false"
left_out: synonyms among the changes of texts (they need a lexicon); BYOLIP, whose target is an average of the weights,
  among the terms it compares. Dropout of the text tower and the optimizer's settings are the config's to choose.
differs: the released code can add the two directions instead of taking their mean. In SwALIP the other view pair is
  here the next one in the list of pairs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mmllm.data.strong_views  # noqa: F401  (registers the transforms of its views)
from mmllm.align.config import HeadConfig
from mmllm.align.model import MAX_LOGIT_SCALE, ProjectionHead
from mmllm.align.objectives import InfoNCE
from mmllm.contracts import AlignBatch, Objective, Stream
from mmllm.errors import UserError, unknown
from mmllm.registry import register

STRONG_PICTURES = [
    {"type": "random_resized_crop", "scale": [0.08, 1.0]},
    {"type": "colour_distortion"},
    {"type": "random_grey"},
    {"type": "random_blur"},
    {"type": "horizontal_flip"},
]
STRONG_TEXTS = ["drop_stop_words", "swap_words", "delete_word"]
EXTRAS = {"siam": 1.0, "bar": 0.025, "swal": 0.2}


@register("objective", "clip_rocket")
class ClipRocket(Objective):
    """CLIP on plain views, and CLIP with label smoothing on ``views`` strong views of either side through heads and a
    temperature of their own (section 3.2): ``(G + n A) / (1 + n)`` with G the plain loss and A the mean over the n x n
    pairs of strong views.

    The strong views are the derived streams ``image@strong0``, ``text@strong0``..., brought along unless the config has
    them. The plain view of the paper is a weak crop: ``transforms: [random_resized_crop]`` of the source.

    Args:
        pair: pictures and texts; other modalities need their derived streams in the config.
        views: n.
        hidden_dim, out_dim: of the strong views' heads.
        label_smoothing: of the strong pairs.
        extra: non-contrastive terms that the paper compares: ``siam``, ``bar``, ``swal``; each is the mean over the
            plain pair and the strong pairs, with the paper's weight (section 3.1).
        same_label: see PairObjective.
    """

    def __init__(
        self,
        pair: Sequence[str],
        views: int = 2,
        hidden_dim: int = 4096,
        out_dim: int = 256,
        label_smoothing: float = 0.1,
        extra: Sequence[str] = (),
        same_label: bool = True,
    ):
        super().__init__()
        if views < 0:
            raise UserError(f"views must be at least 0 (got {views})", "objective 'clip_rocket'")
        for name in extra:
            if name not in EXTRAS:
                raise unknown("extra", name, EXTRAS, "objective 'clip_rocket'")
        self.plain = InfoNCE(pair, same_label)
        self.strong = InfoNCE(pair, same_label, label_smoothing)
        self.pair, self.pair_name, self.gathered = self.plain.pair, self.plain.pair_name, bool(extra)
        self.views, self.hidden_dim, self.out_dim, self.extra = views, hidden_dim, out_dim, list(extra)
        self.streams = {
            f"{s}@strong{k}": {"of": s, "transforms": changes, "cache": False}
            for s, changes in zip(self.pair, (STRONG_PICTURES, STRONG_TEXTS)) for k in range(views)
        }  # fmt: skip
        self.needs = frozenset({*self.plain.needs, *(f"{s}.pooled" for s in self.streams)})
        if extra:
            self.needs |= {f"{s}.pooled" for s in self.pair}
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.heads, self.projectors, self.predictors = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()

    def setup(self, model: Any) -> None:
        config = HeadConfig(hidden_dim=self.hidden_dim, activation="relu")
        for stream in self.pair:
            size = model.tower(stream).pooled_size
            if self.views:
                self.heads[stream] = ProjectionHead(size, self.out_dim, config)
            if self.extra:
                self.projectors[stream] = ProjectionHead(size, self.out_dim, config)
                self.predictors[stream] = ProjectionHead(self.out_dim, self.out_dim, config)

    def forward(self, batch: AlignBatch) -> dict[str, Tensor]:
        out = self.plain(batch)
        out["plain"] = _mean(out)
        if self.views:
            each, found = self._strong_pairs(batch)
            out["loss"] = (out["loss"] + self.views * each) / (1 + self.views)
            out["strong"] = _mean({**out, "loss": each})
            out["strong_scale"] = found
        if self.extra:
            pairs = self._paired_rows(batch)
            for name in self.extra:
                term = EXTRAS[name] * self._extra_term(name, pairs)
                out["loss"], out[name] = out["loss"] + term, term
        return out

    def _strong_pairs(self, batch: AlignBatch) -> tuple[Tensor, Tensor]:
        """[B] mean loss over all pairs of strong views, and their scale."""
        scale = self.log_scale.exp().clamp(max=MAX_LOGIT_SCALE)
        views = {s: [self._view(batch, s, k) for k in range(self.views)] for s in self.pair}
        losses = []
        for a, b in product(*(views[s] for s in self.pair)):
            seen = dataclasses.replace(batch, streams=dict(zip(self.pair, (a, b))), logit_scale={self.pair_name: scale})
            losses.append(self.strong(seen)["loss"])
        return torch.stack(losses).mean(0), scale

    def _view(self, batch: AlignBatch, name: str, number: int) -> Stream:
        stream = batch.streams[f"{name}@strong{number}"]
        return Stream(embedding=F.normalize(self.heads[name](_pooled(stream)).float(), dim=-1), owner=stream.owner)

    def _paired_rows(self, batch: AlignBatch) -> list[tuple[Tensor, Tensor]]:
        """Pooled rows of the items that have both streams: of the plain pair, and of every pair of strong views."""
        owners = [batch.streams[s].owner for s in self.pair]
        rows: list[Tensor | slice] = [slice(None), slice(None)]
        if any(o is not None for o in owners):
            everyone = torch.arange(len(batch), device=next(o for o in owners if o is not None).device)
            a, b = (everyone if o is None else o for o in owners)
            if len(a.unique()) < len(a) or len(b.unique()) < len(b):
                raise UserError("the extra terms need one row per item", "objective 'clip_rocket'", "captions: first")
            both = everyone[torch.isin(everyone, a) & torch.isin(everyone, b)]
            rows = [torch.stack([(o == i).nonzero()[0, 0] for i in both]) if len(both) else both for o in (a, b)]
        pairs = [tuple(self.pair)]
        pairs += [(f"{self.pair[0]}@strong{a}", f"{self.pair[1]}@strong{b}")
                  for a, b in product(range(self.views), repeat=2)]  # fmt: skip
        return [(_pooled(batch.streams[a])[rows[0]], _pooled(batch.streams[b])[rows[1]]) for a, b in pairs]

    def _extra_term(self, name: str, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
        if len(pairs[0][0]) < 2:
            return pairs[0][0].sum() * 0.0
        projected = [tuple(self.projectors[s](x) for s, x in zip(self.pair, pair)) for pair in pairs]
        if name == "bar":
            terms = [bar_term(a, b) for a, b in projected]
        elif name == "siam":
            one, two = (self.predictors[s] for s in self.pair)
            terms = [0.5 * (siam_term(one(a), b) + siam_term(two(b), a)) for a, b in projected]
        else:
            scale = self.log_scale.exp().clamp(max=MAX_LOGIT_SCALE)
            alike = [F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T for a, b in projected]
            others = alike[1:] + alike[:1]
            terms = [0.5 * (swal_term(x, y, scale) + swal_term(x.T, y.T, scale)) for x, y in zip(alike, others)]
        return torch.stack(terms).mean()


def siam_term(predicted: Tensor, target: Tensor) -> Tensor:
    """2 - 2 cos of the predictions [N, P] and their targets, which get no gradient (SiamLIP)."""
    return (2 - 2 * F.cosine_similarity(predicted, target.detach(), dim=-1)).mean()


def bar_term(a: Tensor, b: Tensor, off_diagonal: float = 0.005) -> Tensor:
    """Distance of the cross-correlation of two sets of rows [N, P] from the identity (BarLIP): 0 if and only if each
    coordinate goes with its like alone."""
    x, y = (((t - t.mean(0)) / t.std(0, unbiased=False).clamp(min=1e-6)) for t in (a.float(), b.float()))
    c = x.T @ y / len(a)
    on = (c.diagonal() - 1).square().sum()
    return on + off_diagonal * (c.square().sum() - c.diagonal().square().sum())


@torch.no_grad()
def sinkhorn(scores: Tensor, epsilon: float = 0.05, rounds: int = 3) -> Tensor:
    """Targets [B, K] from scores [B, K]: rows sum to 1, columns come to sum to B / K with the rounds
    (arXiv 2006.09882)."""
    q = ((scores.float() - scores.max()) / epsilon).exp().clamp(min=1e-30)
    b, k = q.shape
    for _ in range(rounds):
        q = q / q.sum(0, keepdim=True) * (b / k)
        q = q / q.sum(1, keepdim=True)
    return q


def swal_term(alike: Tensor, other: Tensor, scale: Tensor) -> Tensor:
    """Cross-entropy of the cosines [N, N] of two views against Sinkhorn targets from those of two others (SwALIP)."""
    return -(sinkhorn(other.detach()) * (scale * alike).log_softmax(1)).sum(1).mean()


def _pooled(stream: Stream) -> Tensor:
    assert stream.features is not None
    return stream.features.pooled


def _mean(out: dict[str, Tensor]) -> Tensor:
    valid = out.get("valid")
    return out["loss"].mean() if valid is None else (out["loss"] * valid).sum() / valid.sum().clamp(min=1)
