"""What a contrastive loss asks of the scores of one anchor, gathered tile by tile: a value, then slopes.

Each class serves one direction. It sees tiles [r, c] whose rows are anchors, in any order of the columns, as many times
as it has rounds, and keeps a few numbers per anchor; then it can tell d loss / d score of any tile seen again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

# Stands for the maximum of nothing: finite, so that differences with it are no NaN.
NOTHING = -1e30
# e^-80 is below the rounding of any sum here; results below e^-87 are denormal, and slow to make.
SMALLEST = -80.0
NOWHERE = torch.iinfo(torch.long).max


class Reduction(Protocol):
    """In-place sums and maxima over the processes that share the anchors of a direction."""

    def sum(self, x: Tensor) -> None: ...

    def max(self, x: Tensor) -> None: ...


@dataclass
class Tile:
    """Scores of r anchors and c candidates with what the caller said about the pairs; None where nothing was said.

    Attributes:
        logits: [r, c] float.
        target: [r, c], at least 0, and 0 where not allowed.
        allow: [r, c] bool.
        log_weight: [r, c].
        start: index of the first candidate.
    """

    logits: Tensor
    target: Tensor | None = None
    allow: Tensor | None = None
    log_weight: Tensor | None = None
    start: int = 0

    def transposed(self, start: int) -> Tile:
        """The same tile with the candidates as anchors."""
        target, allow, weight = (None if x is None else x.T for x in (self.target, self.allow, self.log_weight))
        return replace(self, logits=self.logits.T, target=target, allow=allow, log_weight=weight, start=start)

    def denominator(self, positive_inside: bool) -> Tensor:
        """Scores with their log-weights, -inf outside the denominator; [r, c]."""
        u = self.logits if self.log_weight is None else self.logits + self.log_weight
        if self.allow is not None:
            u = u.masked_fill(~self.allow, -torch.inf)
        if self.target is not None and not positive_inside:
            u = u.masked_fill(self.target > 0, -torch.inf)
        return u


def exp_above(u: Tensor, shift: Tensor) -> Tensor:
    """exp(u - shift) without denormals: [r, c] and [r] -> [r, c]; e^-80 where it is smaller than that."""
    return (u - shift[:, None]).clamp_(min=SMALLEST).exp_()


class Targets:
    """Each anchor's distribution over its candidates: targets divided by their sum, mixed with an even spread.

    Args:
        mass: [n] sum of the targets of each anchor.
        count: [n] number of its allowed candidates.
        smoothing: share of the even spread.
    """

    def __init__(self, mass: Tensor, count: Tensor, smoothing: float = 0.0):
        self.valid = mass > 0
        self.share = (1 - smoothing) / mass.masked_fill(~self.valid, 1.0)
        self.even = smoothing / count.clamp(min=1) if smoothing else None

    def weights(self, at: slice, tile: Tile) -> Tensor | None:
        """[r, c] (or [r, 1]); None where all are 0."""
        w = None if tile.target is None else tile.target * self.share[at, None]
        if self.even is None:
            return w
        even = self.even[at, None] if tile.allow is None else self.even[at, None] * tile.allow
        return even if w is None else w + even


class Divergence:
    """Base; ``targets.valid`` tells which anchors count, the others have loss and slope 0.

    Class attributes:
        rounds: for each sweep over the tiles, whether it needs all of them or only those with a target.
    """

    rounds: tuple[str, ...] = ("all",)

    def __init__(self, targets: Targets):
        self.targets = targets
        self.valid = targets.valid

    def zeros(self) -> Tensor:
        return torch.zeros_like(self.targets.share)

    def read(self, number: int, at: slice, tile: Tile) -> None:
        """Takes in a tile in round ``number``; ``at`` are its anchors."""
        raise NotImplementedError

    def reduce(self, number: int, over: Reduction) -> None:
        """Joins what the processes have read in round ``number``."""
        raise NotImplementedError

    def losses(self) -> Tensor:
        """[n], after all rounds."""
        raise NotImplementedError

    def slopes(self, at: slice, tile: Tile) -> Tensor:
        """d loss / d score of valid anchors, after ``losses``; a new tensor [r, c]."""
        raise NotImplementedError


class CrossEntropy(Divergence):
    """log of the denominator minus the targets' mean score: KL(target || softmax) up to the targets' entropy."""

    def __init__(self, targets: Targets, positive_inside: bool = True):
        super().__init__(targets)
        self.positive_inside = positive_inside
        self.top, self.total, self.hit = self.zeros().fill_(NOTHING), self.zeros(), self.zeros()

    def raise_top(self, at: slice, u: Tensor) -> tuple[Tensor, Tensor]:
        """exp of the scores over the highest so far, [r, c], and the factor on what was summed before, [r]."""
        top = torch.maximum(self.top[at], u.amax(1))
        before = exp_above(self.top[at, None], top)[:, 0]
        self.top[at] = top
        return exp_above(u, top), before

    def read(self, number: int, at: slice, tile: Tile) -> None:
        e, before = self.raise_top(at, tile.denominator(self.positive_inside))
        self.total[at] = self.total[at] * before + e.sum(1)
        weights = self.targets.weights(at, tile)
        if weights is not None:
            self.hit[at] += (weights * tile.logits).sum(1)

    def reduce(self, number: int, over: Reduction) -> None:
        mine = self.top.clone()
        over.max(self.top)
        self.total *= (mine - self.top).exp()
        over.sum(self.total)
        over.sum(self.hit)

    def losses(self) -> Tensor:
        self.valid = self.valid & (self.top > NOTHING / 2)
        self.log_total = self.top + self.total.log()
        return torch.where(self.valid, self.log_total - self.hit, 0.0)

    def probabilities(self, at: slice, u: Tensor, tile: Tile) -> Tensor:
        """Softmax over the denominator, exactly 0 outside; [r, c]."""
        p = exp_above(u, self.log_total[at])
        masked = tile.allow is not None or (tile.target is not None and not self.positive_inside)
        return p.masked_fill_(u == -torch.inf, 0.0) if masked else p

    def slopes(self, at: slice, tile: Tile) -> Tensor:
        p = self.probabilities(at, tile.denominator(self.positive_inside), tile)
        weights = self.targets.weights(at, tile)
        return p if weights is None else p.sub_(weights)


class ReverseKL(CrossEntropy):
    """KL(softmax || target + floor); the floor keeps candidates without target from an infinite loss."""

    def __init__(self, targets: Targets, floor: float = 1e-8):
        super().__init__(targets)
        self.floor, self.cost = floor, self.zeros()

    def excess(self, at: slice, tile: Tile) -> Tensor:
        """Score minus log target, [r, c]; finite also where not allowed."""
        u = tile.logits if tile.log_weight is None else tile.logits + tile.log_weight
        weights = self.targets.weights(at, tile)
        return u - (torch.zeros_like(u[:, :1]) if weights is None else weights).add(self.floor).log()

    def read(self, number: int, at: slice, tile: Tile) -> None:
        e, before = self.raise_top(at, tile.denominator(True))
        self.total[at] = self.total[at] * before + e.sum(1)
        self.cost[at] = self.cost[at] * before + (e * self.excess(at, tile)).sum(1)

    def reduce(self, number: int, over: Reduction) -> None:
        mine = self.top.clone()
        super().reduce(number, over)
        self.cost *= (mine - self.top).exp()
        over.sum(self.cost)

    def losses(self) -> Tensor:
        super().losses()
        self.mean_cost = torch.where(self.valid, self.cost / self.total, 0.0)
        return torch.where(self.valid, self.mean_cost - self.log_total, 0.0)

    def slopes(self, at: slice, tile: Tile) -> Tensor:
        p = self.probabilities(at, tile.denominator(True), tile)
        return p.mul_(self.excess(at, tile).sub_(self.mean_cost[at, None]))


class Hinge(Divergence):
    """Sum over the allowed candidates without target of max(0, margin + score - the targets' mean score).

    Args:
        margin: a number or [n].
    """

    rounds = ("targets", "all")

    def __init__(self, targets: Targets, margin: float | Tensor):
        super().__init__(targets)
        self.hit, self.total, self.active = self.zeros(), self.zeros(), self.zeros()
        self.margin = self.zeros() + margin

    def gaps(self, at: slice, tile: Tile) -> Tensor:
        """margin + score - the targets' mean score of the negatives, -inf elsewhere; [r, c]."""
        gap = tile.logits + (self.margin - self.hit)[at, None]
        if tile.allow is not None:
            gap = gap.masked_fill_(~tile.allow, -torch.inf)
        return gap if tile.target is None else gap.masked_fill_(tile.target > 0, -torch.inf)

    def read(self, number: int, at: slice, tile: Tile) -> None:
        if number == 0:
            weights = self.targets.weights(at, tile)
            if weights is not None:
                self.hit[at] += (weights * tile.logits).sum(1)
        else:
            self.read_gaps(at, tile, self.gaps(at, tile))

    def read_gaps(self, at: slice, tile: Tile, gap: Tensor) -> None:
        self.total[at] += gap.clamp(min=0).sum(1)
        self.active[at] += (gap > 0).sum(1)

    def reduce(self, number: int, over: Reduction) -> None:
        if number == 0:
            over.sum(self.hit)
        else:
            over.sum(self.total)
            over.sum(self.active)

    def losses(self) -> Tensor:
        return torch.where(self.valid, self.total, 0.0)

    def pushed(self, at: slice, tile: Tile) -> Tensor:
        """1 at the negatives that the loss pushes down, else 0; a new tensor [r, c]."""
        return (self.gaps(at, tile) > 0).to(tile.logits.dtype)

    def slopes(self, at: slice, tile: Tile) -> Tensor:
        slope = self.pushed(at, tile)
        weights = self.targets.weights(at, tile)
        return slope if weights is None else slope.sub_(weights * self.active[at, None])


class HardestHinge(Hinge):
    """Hinge on the highest negative alone (VSE++, arXiv 1707.05612); of equal ones, the first."""

    def __init__(self, targets: Targets, margin: float | Tensor):
        super().__init__(targets, margin)
        self.index = torch.full_like(targets.share, NOWHERE, dtype=torch.long)

    def read_gaps(self, at: slice, tile: Tile, gap: Tensor) -> None:
        value, index = gap.max(1)
        better = value > self.total[at]
        self.total[at] = torch.where(better, value, self.total[at])
        self.index[at] = torch.where(better, index + tile.start, self.index[at])

    def reduce(self, number: int, over: Reduction) -> None:
        if number == 0:
            over.sum(self.hit)
        else:
            mine = self.total.clone()
            over.max(self.total)
            backwards = -self.index.masked_fill(mine < self.total, NOWHERE)
            over.max(backwards)
            self.index = -backwards

    def losses(self) -> Tensor:
        self.active = (self.total > 0).to(self.total.dtype)
        return super().losses()

    def pushed(self, at: slice, tile: Tile) -> Tensor:
        candidate = torch.arange(tile.start, tile.start + tile.logits.shape[1], device=tile.logits.device)
        return (self.index[at, None] == candidate).to(tile.logits.dtype)


class BinaryCrossEntropy(Divergence):
    """Sum over the allowed candidates of the logistic loss with target 0..1 (SigLIP, arXiv 2303.15343, equation 1)."""

    def __init__(self, targets: Targets):
        super().__init__(targets)
        self.valid = torch.ones_like(self.valid)
        self.total = self.zeros()

    def read(self, number: int, at: slice, tile: Tile) -> None:
        z = tile.logits
        # Written so that nothing cancels: a right pair with a high score has the small loss that it should have.
        loss = F.softplus(-z.abs()).add_(z.clamp(min=0))
        if tile.target is not None:
            loss.addcmul_(tile.target, z, value=-1)
        if tile.allow is not None:
            loss.mul_(tile.allow)
        self.total[at] += loss.sum(1)

    def reduce(self, number: int, over: Reduction) -> None:
        over.sum(self.total)

    def losses(self) -> Tensor:
        return self.total

    def slopes(self, at: slice, tile: Tile) -> Tensor:
        slope = tile.logits.sigmoid()
        if tile.target is not None:
            slope.sub_(tile.target)
        return slope if tile.allow is None else slope.mul_(tile.allow)
