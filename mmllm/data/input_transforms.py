"""Transforms of tower inputs, whole batches between the preprocessor and the tower: masked words, masked patches.

Others join by ``@register("input_transform", NAME)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmllm.contracts import InputTransform, Tower
from mmllm.errors import UserError
from mmllm.registry import make, register

IGNORED = -100  # the label of a place that no loss looks at, as in transformers


def build_input_transforms(
    specs: Sequence[str | dict[str, Any]], tower: Tower, where: object = "input_transforms"
) -> list[InputTransform]:
    """Input transforms from their names, or ``{"type": NAME, **options}``, ready for a tower.

    Raises:
        UserError: unknown name or option, or one for another modality.
    """
    made = [make("input_transform", spec, where) for spec in specs]
    for transform in made:
        if transform.modality and transform.modality != tower.modality:
            what = f"'{transform.name}' changes {transform.modality} inputs, and this tower reads {tower.modality}"
            raise UserError(what, where)
        transform.setup(tower)
    return made


@register("input_transform", "mask_tokens")
class MaskTokens(InputTransform):
    """Masks words as BERT does (arXiv 1810.04805): of a share ``p`` of the tokens 80 % become the mask token, 10 % a
    random one, 10 % stay; at least one of each text. Gives ``labels`` [B, L]: the old token where chosen, else -100.

    Special tokens and padding are never chosen. A tokenizer without a mask token has its unknown (or last) token.
    """

    modality = "text"
    gives = frozenset({"labels"})

    def __init__(self, p: float = 0.15):
        if not 0 < p <= 1:
            raise UserError(f"p must be above 0 and at most 1 (got {p})", "input transform 'mask_tokens'")
        self.p = p

    def setup(self, tower: Tower) -> None:
        tokenizer = tower.preprocessor()
        self.size = len(tokenizer)
        known = (tokenizer.mask_token_id, tokenizer.unk_token_id, self.size - 1)
        self.mask_id = next(i for i in known if i is not None)
        self.special = torch.tensor(sorted({int(i) for i in tokenizer.all_special_ids} - {tokenizer.unk_token_id}))

    def __call__(self, inputs: dict[str, Any], generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Tensor]]:
        ids = inputs["input_ids"]
        may = ~torch.isin(ids, self.special)
        if inputs.get("attention_mask") is not None:
            may &= inputs["attention_mask"].bool()
        draw = torch.rand(ids.shape, generator=generator).masked_fill(~may, 2.0)
        chosen = (draw < self.p) | ((draw == draw.min(1, keepdim=True).values) & may)
        how = torch.rand(ids.shape, generator=generator)
        random = torch.randint(self.size, ids.shape, generator=generator)
        masked = torch.where(chosen & (how < 0.8), self.mask_id, ids)
        masked = torch.where(chosen & (how >= 0.9), random, masked)
        return {**inputs, "input_ids": masked}, {"labels": torch.where(chosen, ids, IGNORED)}


@register("input_transform", "mask_patches")
class MaskPatches(InputTransform):
    """Blanks a share ``p`` of the square patches of each picture (zero is the mean colour after normalisation).

    Gives ``patch_mask`` [B, patches] bool, True where blank, row by row.

    Args:
        patch_size: side in pixels; None: the tower's.
    """

    modality = "vision"
    gives = frozenset({"patch_mask"})

    def __init__(self, p: float = 0.5, patch_size: int | None = None):
        if not 0 <= p < 1:
            raise UserError(f"p must be at least 0 and below 1 (got {p})", "input transform 'mask_patches'")
        self.p, self.patch_size = p, patch_size

    def setup(self, tower: Tower) -> None:
        own = getattr(getattr(tower, "config", tower), "patch_size", None)
        self.patch_size = self.patch_size or (own if isinstance(own, int) else None)
        if self.patch_size is None:
            raise UserError("this tower has no patch size", "input transform 'mask_patches'", "give patch_size")

    def __call__(self, inputs: dict[str, Any], generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Tensor]]:
        pixels, side = inputs["pixel_values"], int(self.patch_size or 0)
        rows, columns = (n // side for n in pixels.shape[-2:])
        draw = torch.rand(len(pixels), rows * columns, generator=generator)
        blank = draw.argsort(1).argsort(1) < round(self.p * rows * columns)
        area = blank.view(-1, 1, rows, columns).repeat_interleave(side, 2).repeat_interleave(side, 3)
        right, below = pixels.shape[-1] - area.shape[-1], pixels.shape[-2] - area.shape[-2]
        area = torch.nn.functional.pad(area, (0, right, 0, below))
        return {**inputs, "pixel_values": pixels.masked_fill(area, 0.0)}, {"patch_mask": blank}
