"""The data recipe caption_template: texts made from what a record says about itself."""

from __future__ import annotations

from collections.abc import Iterator
from string import Formatter
from typing import Any

from mmllm.contracts import DataRecipe
from mmllm.errors import UserError
from mmllm.registry import register


@register("data_recipe", "caption_template")
class CaptionTemplate(DataRecipe):
    """Gives records one text, a template filled in with their fields and those of their ``meta``.

    A record that lacks one of the fields stays as it is.

    Args:
        template: such as ``"{label}, drawn by {vendor}"``.
    """

    def __init__(self, template: str):
        try:
            self.fields = [name for _, name, _, _ in Formatter().parse(template) if name is not None]
        except ValueError as e:
            raise UserError(f"'{template}' is no template ({e})", "data recipe 'caption_template'") from None
        if "" in self.fields or any(c in f for f in self.fields for c in ".["):
            raise UserError(f"'{template}' has a place without a field's name", "data recipe 'caption_template'")
        self.template = template

    def apply(self, records: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for record in records:
            held = {**(record.get("meta") or {}), **record}
            if all(held.get(f) is not None for f in self.fields):
                yield {**record, "text": self.template.format(**held)}
            else:
                yield record
