"""The whole experiment on a tiny model: stages are kept, a lost portion is redone, and a bias that fails stops it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from planted_source import PLAN, make_source
from tiny_mm import tiny_model

from mmllm.cli.main import cli
from mmllm.decode import Decoder, parse_spec
from mmllm.errors import UserError
from mmllm.report.figures import read_figures
from mmllm.reproduce.arms import Step
from mmllm.reproduce.hallucination import answers, page, run, verdict
from mmllm.reproduce.hallucination.conditions import CONDITIONS, DRAWN, Condition, conditions_of, contrast, grid
from mmllm.train.align import AlignConfig
from mmllm.train.tune_config import TuneConfig

PLANS = run.Plan(data=PLAN, captions=4, decoding_seeds=2, max_new_tokens=4)
FEW = (
    Condition("greedy", "greedy", "baseline", captions=True),
    Condition("sample", "sample", "baseline", captions=True),
    Condition("mask alone", "apc:temperature=1", "control"),
    Condition("sample at T=1/4", "sample:temperature=0.25", "control"),
    Condition("identical view", "contrast:view=identity,beta=0", "control"),
    contrast("vcd", "vcd", "noise", "step=500", captions=True),
)


def save_tiny(step: Step, overrides: Sequence[str], out: Path) -> None:
    """Stands for training: a random model, saved the way a tune run saves its own."""
    (out / "final").mkdir(parents=True)
    if step.command == "tune":
        model, processor = tiny_model()
        model.save_pretrained(out / "final")
        processor.save_pretrained(out / "final")
    (out / "run.json").write_text(json.dumps({"stage": step.command}))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("source"))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Requests of each call of the decoder."""
    seen: list[int] = []
    for name in ("score", "generate"):
        plain = getattr(Decoder, name)

        def counted(self, requests, *rest, plain=plain):
            seen.append(len(requests))
            return plain(self, requests, *rest)

        monkeypatch.setattr(Decoder, name, counted)
    return seen


def test_without_the_bias_nothing_is_compared(
    source: Path, tmp_path: Path, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verdict, "BIAS", 1.0)
    found = run.investigate(PLANS, source, tmp_path / "run", FEW, save_tiny)
    assert not found.took and list(found.judged) == ["greedy"] and not found.chosen
    asked = len(calls)
    text = page.write_report(found, tmp_path / "docs", "smoke", "mmllm reproduce hallucination").read_text()
    assert "**The bias did not take**" in text and "## The test" not in text
    figures = {f.name: f for f in read_figures(tmp_path / "docs" / "hallucination.json")}
    assert figures["manipulation_check"].verdict == "the bias did not take"
    run.investigate(PLANS, source, tmp_path / "run", FEW, save_tiny)
    assert len(calls) == asked


def test_everything_is_kept_and_a_lost_portion_is_redone(
    source: Path, tmp_path: Path, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verdict, "BIAS", -1.0)
    found = run.investigate(PLANS, source, tmp_path / "run", FEW, save_tiny)
    assert found.took and set(found.chosen) == {"vcd"} and found.chosen["vcd"] in grid(FEW[-1])
    expected = {*DRAWN, "greedy", "identical view", "vcd", "vcd (dev)", "second view of vcd", "yes offset",
                "unrelated picture"}  # fmt: skip
    assert set(found.judged) == expected
    greedy = found.judged["greedy"].margins
    np.testing.assert_allclose(found.judged["identical view"].margins, greedy, atol=1e-4)
    np.testing.assert_allclose(found.judged["sample"].margins, greedy, atol=1e-4)
    shift = found.judged["yes offset"].margins - greedy
    assert np.ptp(shift) < 1e-9
    assert {name: len(t.counts) for name, t in found.captions.items()} == {
        "greedy": 4, "sample": 8, "vcd": 4, "vcd (dev)": 4}  # fmt: skip
    text = page.write_report(found, tmp_path / "docs", "smoke", "mmllm reproduce hallucination").read_text()
    for head in (
        "Did the bias take?",
        "What this run could notice",
        "The test",
        "Every condition",
        "Drawn answers",
        "Captions",
    ):
        assert f"## {head}" in text
    # A second call asks nothing, and finds the same.
    asked = len(calls)
    again = run.investigate(PLANS, source, tmp_path / "run", FEW, save_tiny)
    assert len(calls) == asked
    np.testing.assert_array_equal(again.judged["vcd (dev)"].margins, found.judged["vcd (dev)"].margins)
    # Killed in the middle of a stage: one portion and the stage's mark are missing.
    stage = next((tmp_path / "run").glob("test-seed0-*"))
    (stage / "done.json").unlink()
    sorted(stage.glob("scores-*.json"))[1].unlink()
    again = run.investigate(PLANS, source, tmp_path / "run", FEW, save_tiny)
    assert len(calls) == asked + 1
    np.testing.assert_allclose(again.judged["vcd (dev)"].margins, found.judged["vcd (dev)"].margins, atol=1e-4)


def test_the_second_view_alone_is_what_a_blind_question_says(source: Path, tmp_path: Path) -> None:
    """2 m_0 - m_vcd at alpha 1 without a mask is the margin of the noised picture: the same for every other alpha."""
    e = run.Experiment(PLANS, source, tmp_path, FEW, save_tiny)
    e.train(0)
    samples = run.q.dev_questions(e.data, e.prior, 0)[:6]
    specs = ["greedy", "vcd:step=500,alpha=1,beta=0", "vcd:step=500,alpha=3,beta=0"]
    m = e.margins("some", samples, specs)
    alone = 2 * m[specs[0]] - m[specs[1]]
    np.testing.assert_allclose(m[specs[2]], 4 * m[specs[0]] - 3 * alone, atol=1e-3)


def test_questions_of_a_picture_stay_together() -> None:
    sample = run.Sample
    samples = [sample(f"s{i}", "c", [f"p{i % 5}.png"], "?", "yes", ["yes", "no"]) for i in range(20)]
    portions = answers.picture_portions(samples, 2)
    assert [len({s.media[0] for s in p}) for p in portions] == [2, 2, 1]
    assert sum(map(len, portions)) == 20
    seeds = {answers.request_seed(s, 0) for s in samples}
    assert len(seeds) == 5 and {answers.request_seed(s, 1) for s in samples}.isdisjoint(seeds)


def test_every_condition_can_be_read() -> None:
    assert grid(FEW[-1])[0] == "vcd:step=500,alpha=0.25,beta=0" and FEW[-1].spec == "vcd:step=500"
    assert set(conditions_of(False)) < set(conditions_of(True)) == set(CONDITIONS)
    names = [c.name for c in CONDITIONS]
    assert set(DRAWN) < set(names)
    assert len(set(names)) == len(names) and names[0] == "greedy"
    assert len([c for c in CONDITIONS if c.tuned]) <= 8
    for c in CONDITIONS:
        for spec in [c.spec, *(grid(c) if c.tuned else []), *([c.alone[0]] if c.alone else [])]:
            parse_spec(spec)


def test_both_sizes_are_valid_and_smoke_is_the_smaller() -> None:
    plans = run.load_config("configs/effects/hallucination.yaml", [], run.Plans)
    assert plans.smoke.seeds == 1 and plans.full.seeds == 3
    for name in ("train", "twins", "natural", "swapped", "pairs"):
        assert getattr(plans.smoke.data, name) < getattr(plans.full.data, name)
    for plan in (plans.smoke, plans.full):
        align, tune = run.arm(plan).steps
        config = run.load_config(align.config, align.overrides, AlignConfig)
        assert config.streams["image"].image_size == plan.data.scene.size
        run.load_config(tune.config, tune.overrides, TuneConfig)


def test_a_smoke_run_does_not_replace_a_full_report(tmp_path: Path) -> None:
    assert run.written_size(tmp_path) is None
    (tmp_path / "hallucination.json").write_text('{"size": "full"}')
    assert run.written_size(tmp_path) == "full"


def test_the_command_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple] = []
    monkeypatch.setattr(run, "reproduce", lambda *a: asked.append(a) or tmp_path / "hallucination.md")
    done = CliRunner().invoke(cli, ["reproduce", "hallucination", "--smoke", "--out", str(tmp_path)])
    assert done.exit_code == 0 and "hallucination.md" in done.output
    assert asked[0][:3] == ("smoke", None, tmp_path)
    assert asked[0][-1] == "mmllm reproduce hallucination --smoke"
    with pytest.raises(UserError, match="did you mean 'reproduce'"):
        cli.main(["reproduse"], standalone_mode=False)
