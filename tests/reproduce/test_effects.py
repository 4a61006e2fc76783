"""The effect runner: verdicts against scipy, real runs of the tiny world, nothing done twice, mistakes named."""

from __future__ import annotations

import json

import numpy as np
import pytest
import yaml
from scipy.stats import ttest_rel

from mmllm.config import parse_config
from mmllm.errors import UserError
from mmllm.methods import cards
from mmllm.reproduce.effects import run as runner
from mmllm.reproduce.effects.catalogue import description, page, table
from mmllm.reproduce.effects.config import EffectConfig, effect
from mmllm.reproduce.effects.page import picture, table_rows, write_pages
from mmllm.reproduce.effects.verdict import judge, t_interval
from tests.align.conftest import settings, world  # noqa: F401


def test_the_interval_is_scipys_paired_t():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.5, 0.1, 5), rng.normal(0.4, 0.1, 5)
    outcome = judge({"m": a, "b": b}, ("m", "b"), "higher")
    expected = ttest_rel(a, b).confidence_interval(0.95)
    assert (outcome.difference.low, outcome.difference.high) == pytest.approx((expected.low, expected.high))
    assert outcome.difference.mean == pytest.approx((a - b).mean())
    assert outcome.arms["b"].mean == pytest.approx(b.mean())


@pytest.mark.parametrize(
    ("gains", "better", "verdict"),
    [
        ([0.10, 0.11, 0.12], "higher", "shown"),
        ([0.10, 0.11, 0.12], "lower", "opposite"),
        ([-0.10, -0.11, -0.12], "lower", "shown"),
        ([-0.10, -0.11, -0.12], "higher", "opposite"),
        ([0.10, -0.11, 0.12], "higher", "noise"),
        ([0.0, 0.0, 0.0], "higher", "noise"),
    ],
)
def test_verdicts(gains, better, verdict):
    assert judge({"m": gains, "b": [0, 0, 0]}, ("m", "b"), better).verdict == verdict


def test_one_value_has_no_bounds_and_nan_is_refused():
    assert t_interval([1.0]).high == float("inf")
    with pytest.raises(ValueError, match="not all of these"):
        t_interval([1.0, float("nan")])


@pytest.fixture
def tiny(settings, monkeypatch, tmp_path):  # noqa: F811
    """An effect of two arms over the tiny world, in place of filip's own."""
    both = settings["phases"]["both"]
    both |= {"sources": {"things": both["sources"]["things"]}, "objectives": [], "trains": ["image.head", "text.head"]}
    both["train"] = {"max_steps": 4}
    settings |= {"phases": {"both": both}, "measures": {"things": settings["measures"]["things"]}}
    settings["train"] |= {"save_strategy": "no", "logging_steps": 2}

    def arm(name):
        return {"phases": {"both": {"objectives": [{"type": name, "options": {"pair": ["image", "text"]}}]}}}

    data = {"claim": "a", "data": "drawn", "config": settings, "arms": {"one": arm("infonce"), "two": arm("siglip")}}
    data |= {"compare": ["two", "one"], "metric": "things_r1", "also": ["log/loss"], "minutes": 1}
    file = tmp_path / "tiny.yaml"
    monkeypatch.setattr(runner, "effect_file", lambda slug: file)
    monkeypatch.setattr(runner, "effect", lambda slug: parse_config(yaml.safe_load(file.read_text()), EffectConfig))
    monkeypatch.setenv("MMLLM_CACHE", str(tmp_path / "cache"))

    def write(**changes):
        file.write_text(yaml.safe_dump(data | changes))

    write()
    return write


def test_arms_are_real_runs_and_none_is_done_twice(tiny, tmp_path, capsys):
    told = []
    (first,) = runner.run_effects(["filip"], tmp_path / "out", seeds=2, jobs=2, done=told.append)
    assert told == [first] and first.seeds == [0, 1] and first.minutes > 0
    assert len(first.values("things_r1")["one"]) == 2 and all(v > 0 for v in first.values("log/loss")["two"])
    assert not list((tmp_path / "out").glob("*/run"))  # the weights are gone, the figures stay
    assert "4 of 4 runs to do" in capsys.readouterr().out
    (again,) = runner.run_effects(["filip"], tmp_path / "out", seeds=2)
    assert again.figures == first.figures and "to do" not in capsys.readouterr().out
    runner.run_effects(["filip"], tmp_path / "out", seeds=3, jobs=1)
    assert "2 of 6 runs to do" in capsys.readouterr().out
    assert again.values("things_r1")["one"] != [] and table_rows(again)[-1][0] == "two - one"


def test_pages_keep_what_others_wrote(tiny, tmp_path):
    (result,) = runner.run_effects(["filip"], tmp_path / "out", seeds=2, jobs=1)
    docs = tmp_path / "docs"
    other = {"name": cards()[0].slug, "value": 0.5, "better": "higher", "low": 0.4, "high": 0.6, "verdict": "shown"}
    docs.mkdir()
    (docs / "effects.json").write_text(json.dumps({"figures": [other]}))
    text = write_pages([result], docs, "normal", "mmllm reproduce filip").read_text()
    held = {f["name"]: f for f in json.loads((docs / "effects.json").read_text())["figures"]}
    assert held["filip"]["arms"].keys() == {"one", "two"} and held["filip"]["seeds"] == [0, 1]
    assert "`filip`" in text and "Not run yet" in text and (docs / "effects.svg").read_text().startswith("<svg")
    assert write_pages([result], docs, "quick", "x").name == "effects-quick.md"
    assert picture([]).endswith("</svg>\n")


def test_mistakes_are_named_before_anything_runs(tiny, tmp_path):
    tiny(compare=["three", "one"])
    with pytest.raises(UserError, match="unknown arm 'three'"):
        runner.run_effects(["filip"], tmp_path / "out", seeds=2)
    tiny(metric="things_r9")
    with pytest.raises(UserError, match="no figure 'things_r9'.*things_r1"):
        runner.run_effects(["filip"], tmp_path / "out", seeds=2, jobs=1)[0].outcome()
    tiny(config={"dataset": "."})
    with pytest.raises(UserError, match="missing key"):
        runner.run_effects(["filip"], tmp_path / "out", seeds=2)


def test_one_effect_that_fails_does_not_keep_the_others_back(tiny, tmp_path, monkeypatch, capsys):
    good = runner.effect("filip")
    bad = good.model_copy(update={"metric": "things_r9"})
    monkeypatch.setattr(runner, "effect", lambda slug: {"filip": good, "fdt": bad}[slug])
    told = []
    with pytest.raises(UserError, match="1 of 2 effects failed, the first: no figure 'things_r9'"):
        runner.run_effects(["fdt", "filip"], tmp_path / "out", seeds=2, done=lambda r: told.append(r.outcome()))
    assert len(told) == 1 and "tiny.yaml: no figure" in capsys.readouterr().out


@pytest.mark.parametrize("one", cards(), ids=lambda c: c.slug)
def test_every_method_has_an_effect_whose_arms_differ_in_little(one):
    from mmllm.train.align_config import AlignConfig

    config = effect(one.slug)
    assert config.seeds >= 5 and config.minutes <= 4 and config.quick
    made = {a: config.settings(a, 3) for a in config.arms}
    for arm, whole in made.items():
        parse_config(whole, AlignConfig, arm)
        assert whole["train"]["seed"] == 3
        parse_config(config.settings(arm, 0, "quick"), AlignConfig, arm)
    steps = [[p["train"]["max_steps"] for p in m["phases"].values()] for m in made.values()]
    assert all(sum(s) == sum(steps[0]) for s in steps), "the arms have different budgets"


def test_catalogue():
    assert len(table()) == len(cards()) and "## filip" in page({})
    assert ("method", "FILIP: Fine-grained Interactive Language-Image Pre-Training (arXiv 2111.07783)") in description(
        next(c for c in cards() if c.slug == "filip")
    )
