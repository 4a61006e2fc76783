"""The recipe caption_template."""

from __future__ import annotations

import pytest

import mmllm.data.recipes  # noqa: F401
from mmllm.errors import UserError
from mmllm.registry import make


def test_fills_in_fields_and_meta():
    recipe = make("data_recipe", {"type": "caption_template", "template": "a {label} by {vendor}"})
    records = [{"label": "cat", "text": "x", "meta": {"vendor": "noto", "label": "no"}}, {"label": "dog"}]
    made = list(recipe.apply(iter(records)))
    assert made == [{**records[0], "text": "a cat by noto"}, records[1]]
    assert records[0]["text"] == "x"


@pytest.mark.parametrize("template", ["{", "a {}", "{meta.vendor}"])
def test_bad_templates(template):
    with pytest.raises(UserError, match="caption_template"):
        make("data_recipe", {"type": "caption_template", "template": template})
