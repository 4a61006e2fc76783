"""A teacher: a copy of modules whose weights follow those that train (mean teacher, arXiv 1703.01780)."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

import torch
from torch import nn


class Teacher(nn.Module):
    """Copies of modules; after ``follow`` each weight is ``m w' + (1 - m) w``. Buffers are taken over as they are.

    Args:
        modules: name -> module to be followed; not registered here.
        momentum: m.
        end: m at the end of training, reached along a cosine (BYOL, arXiv 2006.07733, section 3.2); None: constant.
    """

    def __init__(self, modules: Mapping[str, nn.Module], momentum: float = 0.996, end: float | None = None):
        super().__init__()
        self.copies = nn.ModuleDict({k: copy.deepcopy(m) for k, m in modules.items()}).requires_grad_(False)
        self.momentum, self.end = momentum, end
        self._followed = list(modules.values())  # a list keeps them out of this module's own parameters
        self.eval()

    def train(self, mode: bool = True) -> Teacher:
        """A teacher is always in eval mode: its dropout is off, its BatchNorm keeps what it has."""
        return super().train(False)

    def momentum_at(self, progress: float) -> float:
        """m at a share ``progress`` of the training."""
        if self.end is None:
            return self.momentum
        return self.end - (self.end - self.momentum) * (math.cos(math.pi * min(progress, 1.0)) + 1) / 2

    @torch.no_grad()
    def follow(self, progress: float = 0.0) -> None:
        """One step towards the modules; ``progress`` is the share of the training that is done."""
        share = 1 - self.momentum_at(progress)
        for mine, theirs in zip(self.copies.values(), self._followed, strict=True):
            for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
                p.lerp_(q.to(p.dtype), share)
            for p, q in zip(mine.buffers(), theirs.buffers(), strict=True):
                p.copy_(q)
