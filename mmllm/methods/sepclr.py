"""Separating common from salient patterns with Contrastive Representation Learning (arXiv 2402.11928).

slug: sepclr
number: 57
shelf: 1
kind: objective
config: |
  streams: {image: {head: {}, connector: {type: mlp}}}
  phases:
    both:
      sources: {pictures: {streams: [image], recipes: [overlay]}}
      objectives: [{type: sepclr, options: {stream: image, target: overlaid}}]
left_out: the other estimators of mutual information that the paper compares with, and its medical data.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmllm.blocks.pooling import masked_mean
from mmllm.contracts import AlignBatch, DataRecipe, Objective
from mmllm.data.captions import label_of
from mmllm.data.media import load_image, open_image
from mmllm.errors import UserError
from mmllm.registry import register


@register("objective", "sepclr")
class SepCLR(Objective):
    """Common patterns in a stream's unit ``embedding``, salient ones of the target data in the mean of its tokens.

    Two views of every item; the background data have no salient pattern: theirs is pulled to the zero vector, which
    stands for all of them where salient patterns are spread (section 3).

    Args:
        stream: with a head (common) and a connector (salient); ``view`` is a second draw of it, which the objective
            brings along: the source needs copies, or a tower that trains.
        target: field of ``meta`` that is true for target items and false for background.
        salient, background, jem: weights of the salient terms, of the background's zero and of the joint entropy,
            whose rise lowers the mutual information of both. (Those of the paper's CIFAR-MNIST are 1000, 1000, 10.)
        tau: of the kernel ``exp(-||a - b||^2 / (2 tau))``.
    """

    def __init__(
        self,
        stream: str,
        target: str = "overlaid",
        view: str | None = None,
        salient: float = 1000.0,
        background: float = 1000.0,
        jem: float = 10.0,
        tau: float = 0.5,
    ):
        super().__init__()
        if tau <= 0:
            raise UserError(f"tau must be above 0 (got {tau})", "objective 'sepclr'")
        self.names = [stream, view or f"{stream}@view"]
        self.streams = {self.names[1]: {"of": stream}}
        self.target, self.salient, self.background, self.jem, self.tau = target, salient, background, jem, tau
        self.needs = frozenset({f"{s}.{k}" for s in self.names for k in ("embedding", "token_embedding")})

    def forward(self, batch: AlignBatch) -> dict[str, Tensor]:
        common, salient = [], []
        for name in self.names:
            stream = batch.streams[name]
            assert stream.embedding is not None and stream.token_embedding is not None and stream.token_mask is not None
            common.append(stream.embedding.float())
            salient.append(masked_mean(stream.token_embedding.float(), stream.token_mask))
        owner = batch.streams[self.names[0]].owner
        items = range(len(batch)) if owner is None else owner.tolist()
        target = torch.tensor([self.is_target(batch, i) for i in items], device=common[0].device)
        with torch.autocast(common[0].device.type, enabled=False):  # squares of small differences
            return self.terms(common, salient, target)

    def is_target(self, batch: AlignBatch, item: int) -> bool:
        """Whether an item is of the target data.

        Raises:
            UserError: its record does not say.
        """
        meta = (batch.extras.get("meta") or [{}] * len(batch))[item] or {}
        if meta.get(self.target) is None:
            do = "name its option target, or take the data recipe overlay"
            raise UserError(f"record has no meta.{self.target}", "objective 'sepclr'", do)
        return bool(meta[self.target])

    def terms(self, common: list[Tensor], salient: list[Tensor], target: Tensor) -> dict[str, Tensor]:
        """The loss and its parts; vectors [N, P] of two views each, target [N] bool."""
        kept = [s * target[:, None] for s in salient]
        apart = (salient[0] - salient[1]).square().sum(-1)
        own = (common[0] - common[1]).square().sum(-1).mean()
        own = own + 2 * self.tau * sum(uniformity(c, self.tau) for c in common)
        count = target.sum().clamp(min=1)
        salience = (apart * target).sum() / count
        salience = salience + 2 * self.tau * sum(uniformity(s, self.tau) for s in kept)
        zero = sum((s.square().sum(-1) * ~target).sum() for s in salient) / (2 * (~target).sum().clamp(min=1))
        joint = sum(joint_entropy(c, s, self.tau) for c, s in zip(common, kept)) / 2
        loss = own + self.salient * salience + self.background * zero + self.jem * joint
        return {"loss": loss, "common": own, "salient": salience, "background": zero, "joint": joint}  # type: ignore[dict-item]


def log_kernel(x: Tensor, tau: float) -> Tensor:
    """``-||x_i - x_j||^2 / (2 tau)`` of all rows [N, P], [N, N]."""
    squares = x.square().sum(-1)
    return -(squares[:, None] + squares[None] - 2 * x @ x.T).clamp(min=0) / (2 * tau)


def uniformity(x: Tensor, tau: float = 0.5) -> Tensor:
    """Half of the log of the mean kernel over pairs of different rows; 0 where there are none."""
    n = len(x)
    if n < 2:
        return x.sum() * 0.0
    i, j = torch.triu_indices(n, n, 1, device=x.device)
    return 0.5 * (log_kernel(x, tau)[i, j].logsumexp(0) - float(np.log(n * (n - 1) / 2)))


def joint_entropy(common: Tensor, salient: Tensor, tau: float = 0.5) -> Tensor:
    """``mean_i log mean_j k(c_i, c_j) k(s_i, s_j)``, less the joint entropy's estimate (k-JEM, equation 11)."""
    logs = log_kernel(common, tau) + log_kernel(salient, tau)
    return (logs.logsumexp(1) - float(np.log(len(common)))).mean()


@register("data_recipe", "overlay")
class Overlay(DataRecipe):
    """Pastes a small cut-out of one of a few things onto a share of the pictures; the others stay as they are.

    ``meta.overlaid`` says which, ``meta.overlay`` what was pasted, and ``meta.under`` repeats the record's label.
    Pictures become PNG in memory.

    Args:
        things: the labels that are pasted, or how many, the first in the alphabet; their records are used up for it.
        share: of the pictures that are target data.
        side: of the picture in pixels; ``size`` of the cut-out as a share of it.
        seed: of the draws.

    Raises:
        UserError: no such labels, or no pictures of others.
    """

    def __init__(
        self,
        things: int | Sequence[str] = 5,
        share: float = 0.5,
        side: int = 128,
        size: float = 0.4,
        seed: int = 0,
    ):
        if not things or not 0 <= share <= 1 or not 0 < size <= 1:
            raise UserError("things must not be empty, share in 0..1 and size above 0", "data recipe 'overlay'")
        self.things, self.share, self.side, self.size, self.seed = things, share, side, size, seed

    def apply(self, records: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        held = [r for r in records if r.get("image")]
        known = sorted({label_of(r) for r in held})
        names = known[: self.things] if isinstance(self.things, int) else [n for n in self.things if n in known]
        rest = [r for r in held if label_of(r) not in names]
        if not rest or not names:
            raise UserError(f"no pictures are left beside the {len(names)} things", "data recipe 'overlay'")
        of = {n: [r["image"] for r in held if label_of(r) == n] for n in names}
        rng = np.random.default_rng(self.seed)
        for record in rest:
            name, target = names[rng.integers(len(names))], bool(rng.random() < self.share)
            media, place = of[name], rng.random(2)
            cutout = media[rng.integers(len(media))] if target else None
            meta = {**(record.get("meta") or {}), "overlaid": target, "under": label_of(record)}
            picture = self.painted(record["image"], cutout, place)
            yield {**record, "image": picture, "meta": {**meta, "overlay": name} if target else meta}

    def painted(self, medium: Any, cutout: Any, place: Any) -> bytes:
        """A picture of ``side`` pixels as PNG, with the cut-out at ``place`` (shares of the room there is)."""
        canvas = load_image(medium, self.side).resize((self.side, self.side))
        if cutout is not None:
            thing = open_image(cutout).convert("RGBA")
            side = round(self.side * self.size)
            thing.thumbnail((side, side))
            x, y = (int(p * (self.side - n + 1)) for p, n in zip(place, thing.size))
            thing_on = Image.new("RGBA", canvas.size)
            thing_on.paste(thing, (x, y))
            canvas = Image.alpha_composite(canvas.convert("RGBA"), thing_on).convert("RGB")
        out = io.BytesIO()
        canvas.save(out, "PNG", compress_level=1)
        return out.getvalue()
