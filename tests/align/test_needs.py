"""What an objective needs and no tower, head or transform gives is told by name before any data are read."""

from __future__ import annotations

import pytest

from mmllm.config import parse_config
from mmllm.contracts import Objective
from mmllm.errors import UserError
from mmllm.registry import register
from mmllm.train.align import AlignConfig, align


@register("objective", "wanting")
class Wanting(Objective):
    """Needs what its option says."""

    def __init__(self, need):
        super().__init__()
        self.needs = frozenset({need})


@pytest.fixture
def wants(settings, tmp_path):
    """``wants(need)`` runs a phase without data whose one objective needs it; gives the line of the error."""

    def run(need, streams=(), **changes):
        source = {"data": "not_there.jsonl", "streams": ["image", "text"]}
        objective = {"type": "wanting", "options": {"need": need}}
        phase = {"sources": {"s": source}, "objectives": [objective], "trains": ["image.head"]}
        settings["streams"] |= dict(streams)
        settings.update(phases={"only": phase}, measures={}, **changes)
        with pytest.raises(UserError) as caught:
            align(parse_config(settings, AlignConfig), tmp_path / "run")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return run


@pytest.mark.parametrize(
    ("need", "words"),
    [
        ("text.grid", ["'wanting'", "'text.grid'", "HFText"]),
        ("image.input_ids", ["'wanting'", "'image.input_ids'", "TinyViT"]),
        ("image.labels", ["'wanting'", "'image.labels'", "transforms"]),
        ("text.token_embedding", ["'wanting'", "'text'", "no connector", "streams.text.connector"]),
        ("audio.embedding", ["'wanting'", "'audio'", "source 's'"]),
        ("image@strong.embedding", ["'wanting'", "'image@strong'"]),
        ("labelz", ["'wanting'", "did you mean 'labels'"]),
    ],
)
def test_what_no_part_gives_is_told(wants, need, words):
    line = wants(need)
    assert all(w in line for w in words), line


def test_a_stream_without_head_has_no_embedding(wants, settings):
    line = wants("image.embedding", {"image": {**settings["streams"]["image"], "head": None}})
    assert all(w in line for w in ("'wanting'", "'image'", "no head", "streams.image.head")), line


def test_extras_of_another_stream_or_name_do_not_count(wants):
    masked = {"text@mlm": {"of": "text", "input_transforms": ["mask_tokens"]}}
    assert "'text.labels'" in wants("text.labels", masked)
    assert "'text@mlm.patch_mask'" in wants("text@mlm.patch_mask", masked)


@pytest.mark.parametrize(
    ("need", "streams"),
    [
        ("image.grid", {}),
        ("image.layers[-1]", {}),
        ("text.input_ids", {}),
        ("text@mlm.labels", {"text@mlm": {"of": "text", "input_transforms": ["mask_tokens"]}}),
        ("image.token_embedding", {}),
        ("meta.place", {}),
    ],
)
def test_what_is_there_lets_the_run_come_to_its_data(wants, need, streams):
    assert "no such records file" in wants(need, streams)


def test_input_transforms_of_a_plain_stream_are_refused(wants, settings):
    """They would apply to the measures' pictures as well, or to nothing."""
    line = wants("image.embedding", {"image": {**settings["streams"]["image"], "input_transforms": ["mask_patches"]}})
    assert "'input_transforms' is for a stream that is derived from another" in line


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"reset": ["image.haed"]}, "did you mean 'image.head'"),
        ({"hooks": ["recrod"]}, "unknown step_hook 'recrod'"),
        ({"trains": ["image.haed"]}, "did you mean 'image.head'"),
    ],
)
def test_mistakes_of_a_later_phase_show_before_data_are_read(settings, tmp_path, change, words):
    settings["phases"]["both"]["sources"]["things"]["data"] = "not_there.jsonl"
    settings["phases"]["words"] |= change
    with pytest.raises(UserError, match=words):
        align(parse_config(settings, AlignConfig), tmp_path / "run")
