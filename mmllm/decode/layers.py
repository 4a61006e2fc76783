"""Ranges of layers as text: ``low``, ``high``, ``20:28``, ``0.625:0.875`` (shares of the depth) or ``4,8,12``."""

from __future__ import annotations

from mmllm.errors import UserError


def layer_numbers(text: str, depth: int, tied: bool = False, where: str = "decode: layers") -> list[int]:
    """Numbers of the layer outputs meant, 1..depth, ascending.

    ``low`` and ``high`` are every second output of the first and second half, as DoLa has them: with tied embeddings
    ``low`` begins at 2, since the first outputs are still close to the input word. The last layer itself is never part
    of them.

    Args:
        depth: number of layers of the model.
        tied: input and output embeddings are one matrix.

    Raises:
        UserError: the text cannot be read, or names a layer that the model does not have.
    """
    if text in ("low", "high"):
        half = depth // 2
        chosen = list(range(2 if tied else 1, half, 2) if text == "low" else range(half, depth, 2))
        return chosen or [max(1, depth - 1)]
    try:
        if ":" in text:
            low, high = (_number(x, depth) for x in text.split(":"))
            chosen = list(range(low, high + 1))
        else:
            chosen = sorted({_number(x, depth) for x in text.split(",")})
    except ValueError:
        do = "write low, high, 20:28, 0.6:0.9 or 4,8,12"
        raise UserError(f"'{text}' is no range of layers", where, do) from None
    if not chosen or not 1 <= chosen[0] <= chosen[-1] <= depth:
        raise UserError(f"'{text}' names no layers among 1..{depth}", where)
    return chosen


def check_layers(text: str, where: str) -> None:
    """Reads the text for a deep model, so that a range that can never be read fails before a model is loaded.

    Raises:
        UserError: it cannot be read.
    """
    layer_numbers(text, 1000, where=where)


def _number(text: str, depth: int) -> int:
    text = text.strip()
    if "." in text:
        share = float(text)
        if not 0 <= share <= 1:
            raise ValueError(text)
        return max(1, round(share * depth))
    return int(text)
