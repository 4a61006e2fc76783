"""Cuts a batch of token ids down to its longest text, so that a fixed context costs nothing where texts are short."""

from __future__ import annotations

from torch import Tensor


def trim_text(inputs: dict[str, Tensor], multiple: int = 1) -> dict[str, Tensor]:
    """Drops the columns that are padding in every row, at either end.

    Args:
        inputs: ``attention_mask`` [B, L] beside ``input_ids`` and other tensors [B, L]; other shapes stay.
        multiple: keep a number of columns divisible by this, where there are so many (compiled and half-precision
            kernels like 8).
    """
    mask = inputs["attention_mask"]
    used = mask.bool().any(0).nonzero().flatten()
    if not len(used):
        return inputs
    first, last = int(used[0]), int(used[-1]) + 1
    short = (first - last) % multiple
    grow = min(short, mask.shape[1] - last)  # to the right first, then to the left
    last, first = last + grow, max(0, first - (short - grow))
    return {k: v[:, first:last] if v.shape[:2] == mask.shape else v for k, v in inputs.items()}
