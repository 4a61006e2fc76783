"""What a method did at each token: the best tokens of every view and of the mix, and how many stayed plausible."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class StepTrace:
    """One token of one request.

    Attributes:
        index: the request.
        step: number of tokens before.
        token: the one taken.
        views: logits [K, V], view 0 first.
        scores: [V] after mix, masks and processors; -inf where masked.
    """

    index: int
    step: int
    token: int
    views: Tensor
    scores: Tensor


Observer = Callable[[StepTrace], None]


def step_table(trace: StepTrace, tokenizer: Any, names: list[str], top: int = 5) -> dict[str, Any]:
    """A step as plain values: the token, the ``top`` tokens with probabilities of each view and of the mix.

    Args:
        names: of the views, view 0 first.
    """

    def best(z: Tensor) -> list[dict[str, Any]]:
        p, index = z.float().softmax(-1).topk(min(top, len(z)))
        return [{"token": tokenizer.decode([i]), "p": round(float(x), 4)} for i, x in zip(index.tolist(), p)]

    return {
        "step": trace.step,
        "token": tokenizer.decode([trace.token]),
        "views": {name: best(z) for name, z in zip(names, trace.views)},
        "mix": best(trace.scores),
        "plausible": int(torch.isfinite(trace.scores).sum()),
    }
