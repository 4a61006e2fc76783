"""Box tokens: an LLM says a box in two tokens, one for each corner, whose text is the ordinary text of a box.

As in Kosmos-2 (arXiv 2306.14824) a corner is one of bins x bins places. The tokens read `<box>X,Y,` and `X,Y</box>`, so
whoever decodes them, vLLM too, gets `<box>X0,Y0,X1,Y1</box>` with integers 0..999.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from tokenizers import AddedToken

from mmllm.blocks.box_code import box_code
from mmllm.data.questions import BOX_SCALE
from mmllm.errors import UserError

_BOX = re.compile(r"<box>\s*(\d{1,4})\s*,\s*(\d{1,4})\s*,\s*(\d{1,4})\s*,\s*(\d{1,4})\s*</box>")


def bin_text(index: int, bins: int) -> str:
    """The middle of a bin as an integer 0..999."""
    return str(round((index + 0.5) / bins * BOX_SCALE))


def snap_boxes(text: str, bins: int) -> str:
    """The text with every coordinate of its boxes moved to the middle of its bin, so that box tokens can say it."""

    def snapped(match: re.Match[str]) -> str:
        found = (min(int(int(v) / (BOX_SCALE + 1) * bins), bins - 1) for v in match.groups())
        return "<box>" + ",".join(bin_text(i, bins) for i in found) + "</box>"

    return _BOX.sub(snapped, text)


def corner_tokens(bins: int) -> list[str]:
    """All box tokens: those of the upper left corner, row by row, then those of the lower right one."""
    middle = [bin_text(i, bins) for i in range(bins)]
    first = [f"<box>{x},{y}," for y in middle for x in middle]
    return [*first, *(f"{x},{y}</box>" for y in middle for x in middle)]


def add_box_tokens(model: Any, processor: Any, bins: int) -> None:
    """Gives tokenizer and LLM the box tokens. Each is embedded as its two coordinates in the code in which the
    objective ``region_box`` writes boxes into visual tokens, as long as a word is: a box that was seen can be copied.

    Raises:
        UserError: the model has box tokens, or its embeddings are too narrow for the code.
    """
    if processor.box_bins:
        raise UserError("this model has box tokens already", "box_tokens", "leave out box_tokens")
    llm: Any = model.language_model
    old: torch.Tensor = llm.get_input_embeddings().weight
    count, dim = len(processor.tokenizer), old.shape[1]
    try:
        x0, y0, x1, y1 = box_code(dim, bins)
    except ValueError as e:
        raise UserError(f"this LLM is too narrow for box tokens ({e})", "box_tokens", "leave out box_tokens") from None
    words = old.detach()[:count].float()
    centre = words.mean(0)
    length = (words - centre).norm(dim=-1).mean()
    names = corner_tokens(bins)
    processor.tokenizer.add_tokens([AddedToken(name, normalized=False, special=False) for name in names])
    llm.resize_token_embeddings(max(len(processor.tokenizer), len(old)), mean_resizing=False)
    corners = [(y[:, None] + x[None]).flatten(0, 1) / 2**0.5 for x, y in ((x0, y0), (x1, y1))]
    rows = centre + length * torch.cat(corners).to(centre)
    ids = processor.tokenizer.convert_tokens_to_ids(names)
    with torch.no_grad():
        for part in (llm.get_input_embeddings(), llm.get_output_embeddings()):  # one table where they are tied
            part.weight[ids] = rows.to(part.weight)
    model.config.text_config.vocab_size = llm.config.vocab_size
    processor.box_bins = bins
