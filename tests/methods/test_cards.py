"""Every method file has a card that names something that is registered, and a test of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mmllm.errors import UserError
from mmllm.methods import card, cards, read_card
from mmllm.registry import get

ALL = cards()
HERE = Path(__file__).parent


@pytest.mark.parametrize("one", ALL, ids=lambda c: c.slug)
def test_card(one):
    assert one.title and one.left_out and (HERE / f"test_{one.module.split('.')[-1]}.py").is_file()
    named = yaml.safe_load(one.config)
    assert isinstance(named, dict)
    if one.kind in ("objective", "batch_sampler", "step_hook", "scorer", "data_recipe", "transform", "measure"):
        found = [x for x in types_in(named) if is_registered(one.kind, x)]
        assert found, f"{one.config} names nothing that is registered as {one.kind}"


def types_in(value):
    """Every ``type`` in a piece of config, and bare names in its lists."""
    if isinstance(value, dict):
        for key, v in value.items():
            yield from [v] if key == "type" else types_in(v)
    elif isinstance(value, list):
        for v in value:
            yield from [v] if isinstance(v, str) else types_in(v)


def is_registered(kind, name):
    try:
        return get(kind, name) is not None
    except UserError:
        return False


def test_numbers_and_slugs_are_unique():
    assert len({c.number for c in ALL}) == len({c.slug for c in ALL}) == len(ALL)


def test_the_first_shelf_is_whole():
    assert len([c for c in ALL if c.shelf == 1]) == 27


def test_cards_are_read_without_torch():
    code = "import sys; from mmllm.methods import cards; assert cards(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_mistakes_are_named(tmp_path):
    with pytest.raises(UserError, match="did you mean 'filip'"):
        card("fillip")
    for text, words in (
        ('"""No number.\n\nslug: x\n"""', "no 'Title"),
        ('"""T (arXiv 2101.00001).\n\nslug: x\n"""', "missing"),
        ('"""T (arXiv 2101.00001).\n\n{slug: y, number: 1, shelf: 1, kind: head, config: "", left_out: a}\n"""', "'y'"),
    ):
        (tmp_path / "x.py").write_text(text)
        with pytest.raises(UserError, match=words):
            read_card(tmp_path / "x.py")
