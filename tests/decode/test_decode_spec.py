"""Specs: reading, writing, gains and errors that name the nearest valid word."""

import subprocess
import sys

import pytest

from mmllm.decode import parse_spec
from mmllm.errors import UserError


@pytest.mark.parametrize(
    "text",
    ["greedy", "sample:temperature=0.7,top_p=0.9", "vcd:alpha=0.5,step=300", "ritual:transform=hflip,normalize=true"],
)
def test_round_trip(text):
    spec = parse_spec(text)
    assert str(spec) == text
    assert parse_spec(str(spec)) == spec


def test_gain_is_the_sum_of_weights():
    assert parse_spec("vcd:alpha=2").weights == (3.0, -2.0)
    assert parse_spec("vcd:alpha=2").gain == 1
    assert parse_spec("ritual").gain == 4
    assert parse_spec("ritual:normalize=true").gain == 1
    assert parse_spec("ritual:normalize=true").weights == (0.25, 0.75)


def test_zero_weight_views_are_dropped():
    assert parse_spec("vcd:alpha=0").views == ()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("vdc", "'vcd'"),
        ("vcd:alpa=1", "'alpha'"),
        ("ritual:transform=hflp", "'hflip'"),
        ("vcd:alpha=much", "not a number"),
        ("vcd:alpha=nan", "finite"),
        ("vcd:step=1000", "0..999"),
        ("vcd:beta=1.5", "0..1"),
        ("sample:temperature=-1", "not in 0..inf"),
        ("ritual:normalize=maybe", "true or false"),
        ("vcd:alpha", "key=value"),
        ("", "empty"),
    ],
)
def test_mistakes(text, says):
    with pytest.raises(UserError, match=says):
        parse_spec(text)


def test_specs_do_not_import_torch():
    code = "import sys, mmllm.decode; mmllm.decode.parse_spec('vcd'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
