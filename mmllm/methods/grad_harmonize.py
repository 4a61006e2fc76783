"""Scaling Multimodal Pre-Training via Cross-Modality Gradient Harmonization (arXiv 2211.02077).

slug: grad-harmonize
number: 3
shelf: 1
kind: step_hook
config: "hooks: [{type: grad_harmonize, anchor: image}]  # and two objectives that share the stream image"
left_out: gradients of single triplets by the parameters of the towers; a triplet's gradients are those of its anchor's
  embedding (or, with level batch, those of the whole batch by the anchor's parameters). HowTo100M and YouTube8M.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmllm.contracts import AlignBatch, StepHook
from mmllm.errors import UserError, unknown
from mmllm.registry import register

LEVELS = ("embedding", "batch")
WHERE = "step hook 'grad_harmonize'"


@register("step_hook", "grad_harmonize")
class GradHarmonize(StepHook):
    """Two losses that share a stream: gradients that conflict lose what points against the other one, and items whose
    gradients conflict most take no part (sections 3.2 and 3.3).

    The gradients g1 and g2 are those of the two weighted losses. Where their inner product is negative, each is
    replaced by its part orthogonal to the other. ``cos(g1, g2)`` of an item below ``gamma`` drops the item from both
    losses. Of a gradient by a unit vector the part along the vector is left out, since it moves nothing.

    Args:
        anchor: the stream that both losses look at.
        terms: the names of the two losses in the log, such as ``infonce:image:audio``; may be left out where the phase
            has two with a loss per item.
        realign: whether conflicting gradients are projected; False leaves the curriculum alone.
        gamma: least cosine at the start and at the end of the phase, between them a line; None keeps every item.
        level: ``embedding`` takes gradients per row of the anchor's embedding; ``batch`` projects the gradients of the
            whole batch by the anchor's parameters.
        mark: a field of ``meta`` that says which items are known to be wrong: how well a low cosine finds them is
            logged as ``conflict_auc``.
    """

    def __init__(
        self,
        anchor: str,
        terms: Sequence[str] = (),
        realign: bool = True,
        gamma: Sequence[float] | None = (-0.3, 0.0),
        level: str = "embedding",
        mark: str | None = None,
    ):
        if level not in LEVELS:
            raise unknown("level", level, LEVELS, WHERE)
        if len(terms) not in (0, 2):
            raise UserError(f"terms must name two losses (got {list(terms)})", WHERE)
        if gamma is not None and len(gamma) != 2:
            raise UserError(f"gamma must be two numbers, at the start and at the end (got {list(gamma)})", WHERE)
        self.anchor, self.terms, self.realign = anchor, list(terms), realign
        self.gamma, self.level, self.mark = gamma, level, mark

    def after_loss(self, model: Any, batch: Any, losses: dict[str, Any], step: int) -> None:
        names, seen = self._names(losses["each"]), self._seen(losses["batches"])
        weights = [_weight(model, name, step) for name in names]
        each = [losses["each"][name] for name in names]
        if any(len(loss) != len(seen) for loss, _ in each):
            raise UserError("the losses have items of several processes", WHERE, "run in one process")
        stream = seen.streams[self.anchor]
        z = stream.embedding
        assert z is not None
        means = [w * _mean(loss, valid) for w, (loss, valid) in zip(weights, each)]
        pulls = [tangent(z, g) for g in _gradients(means, z)]
        owner = torch.arange(len(z), device=z.device) if stream.owner is None else stream.owner
        cosine = item_cosine(pulls[0], pulls[1], owner, len(seen))
        triplet = each[0][1] & each[1][1]
        losses["conflict"] = ((cosine < 0) & triplet).sum() / triplet.sum().clamp(min=1)
        if self.mark is not None:
            wrong = torch.tensor([bool(m.get(self.mark)) for m in seen.extras["meta"]], device=z.device)
            losses["conflict_auc"] = auc(-cosine[triplet], wrong[triplet])
        if self.gamma is not None:
            start, end = self.gamma
            kept = (cosine >= start + (end - start) * seen.progress) | ~triplet
            losses["kept"] = kept.float().mean()
            left = [w * _mean(loss, valid & kept) for w, (loss, valid) in zip(weights, each)]
            losses["loss"] = losses["loss"] + (torch.stack(left) - torch.stack(means)).sum()
            means = left
            pulls = [tangent(z, g) for g in _gradients(means, z)]
        if self.realign:
            self._realign(means, z, pulls, losses)

    def _realign(self, means: list[Tensor], z: Tensor, pulls: list[Tensor], losses: dict[str, Any]) -> None:
        """Adds a term of value 0 whose gradient turns the two losses' gradients into the projected ones."""
        if self.level == "embedding":
            of, change = [z], [correction(pulls[0], pulls[1])]
        else:
            of = [p for name, params in self.groups.items() if name.startswith(f"{self.anchor}.") for p in params]
            if not of:
                raise UserError(f"nothing of '{self.anchor}' trains", WHERE, "let it train, or take level: embedding")
            found = [torch.autograd.grad(m, of, retain_graph=True, allow_unused=True) for m in means]
            flat = [torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zip(of, gs)])
                    for gs in found]  # fmt: skip
            pieces = correction(flat[0][None], flat[1][None])[0].split([p.numel() for p in of])
            change = [piece.view_as(p) for piece, p in zip(pieces, of)]
        if any(bool(c.any()) for c in change):
            extra = torch.stack([(x * c).sum() for x, c in zip(of, change)]).sum()
            losses["loss"] = losses["loss"] + extra - extra.detach()

    def _names(self, each: dict[str, Any]) -> list[str]:
        for name in self.terms:
            if name not in each:
                raise unknown("loss", name, each, WHERE)
        names = self.terms or list(each)
        if len(names) != 2:
            do = "name two of them as 'terms'"
            raise UserError(f"the phase has {len(names)} losses per item: {', '.join(names)}", WHERE, do)
        return names

    def _seen(self, batches: dict[str, AlignBatch]) -> AlignBatch:
        found = [b for b in batches.values() if self.anchor in b.streams]
        if len(found) != 1 or found[0].streams[self.anchor].embedding is None:
            raise UserError(f"'{self.anchor}' must have an embedding in one source, and is in {len(found)}", WHERE)
        return found[0]


def correction(g1: Tensor, g2: Tensor) -> Tensor:
    """What projecting conflicting rows changes in ``g1 + g2`` [N, P] (equation 4); exactly 0 where none conflicts."""
    dot = (g1 * g2).sum(-1, keepdim=True)
    # Each loses its part along the other one: <g1, g2> / |g2|^2 g2 and <g1, g2> / |g1|^2 g1.
    parts = [g / g.square().sum(-1, keepdim=True).clamp(min=torch.finfo(g.dtype).tiny) for g in (g1, g2)]
    return torch.where(dot < 0, -dot * (parts[0] + parts[1]), 0.0)


def tangent(z: Tensor, g: Tensor) -> Tensor:
    """A gradient [N, P] without its part along the unit vectors z [N, P]."""
    z = z.detach()
    return g - (g * z).sum(-1, keepdim=True) * z


def item_cosine(g1: Tensor, g2: Tensor, owner: Tensor, size: int) -> Tensor:
    """[size]: cosine of the gradients of all rows of each item; 0 where one of them is 0."""

    def summed(x: Tensor) -> Tensor:
        return x.new_zeros(size).index_add(0, owner, x.sum(-1))

    length = (summed(g1 * g1) * summed(g2 * g2)).sqrt()
    return (summed(g1 * g2) / length.clamp(min=torch.finfo(g1.dtype).tiny)).clamp(-1, 1)


def auc(score: Tensor, positive: Tensor) -> Tensor:
    """Chance that a positive scores above a negative, ties half; 0.5 where either is missing."""
    a, b = score[positive][:, None], score[~positive][None]
    if not a.numel() or not b.numel():
        return score.new_tensor(0.5)
    return ((a > b).float() + 0.5 * (a == b).float()).mean()


def _gradients(values: list[Tensor], z: Tensor) -> list[Tensor]:
    found = [torch.autograd.grad(v, z, retain_graph=True, allow_unused=True)[0] for v in values]
    return [torch.zeros_like(z) if g is None else g for g in found]


def _mean(loss: Tensor, valid: Tensor) -> Tensor:
    return (loss * valid).sum() / valid.sum().clamp(min=1)


def _weight(model: Any, name: str, step: int) -> float:
    """The weight of a logged loss in this step."""
    found = [t for t in model.terms if name == t.name or name.startswith(f"{t.name}/")]
    return found[0].weight_at(step, model.total_steps) if found else 1.0
