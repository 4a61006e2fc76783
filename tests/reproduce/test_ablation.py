"""`mmllm reproduce starter`: arms are the recipe's own configs, differences are paired, the page holds the table."""

import json

import pytest

from mmllm.config import load_config
from mmllm.errors import UserError
from mmllm.reproduce.ablation import CONFIG, MARK, Plan, arm_of, differences, reproduce, write_page
from mmllm.reproduce.arms import train_arm
from mmllm.reproduce.ledger import Ledger
from mmllm.train.align_config import AlignConfig
from mmllm.train.tune_config import TuneConfig

PAGE = "# Starter\n\n<!-- ablation -->\nstale\n<!-- end ablation -->\n\nMore.\n"


@pytest.fixture
def plan() -> Plan:
    return load_config(CONFIG, [], Plan)


def resolved(plan: Plan, name: str) -> list:
    kinds = (AlignConfig, TuneConfig, TuneConfig)
    return [load_config(s.config, list(s.overrides), kind) for s, kind in zip(arm_of(plan, name).steps, kinds)]


def test_every_arm_changes_the_recipes_own_configs_and_nothing_else(plan):
    recipe = resolved(plan, "recipe")
    for name in plan.arms:
        differ = [a.model_dump() != b.model_dump() for a, b in zip(resolved(plan, name), recipe)]
        own = [bool(getattr(plan.arms[name], stage)) for stage in ("align", "pretrain", "tune")]
        assert differ == own and any(own) == (name != "recipe"), name
    for align, pretrain, tune in (resolved(plan, name) for name in plan.arms):
        steps = {n: p.train["max_steps"] for n, p in align.phases.items()}
        assert steps["pictures"] == recipe[0].phases["pictures"].train["max_steps"]
        assert pretrain.train.max_steps == recipe[1].train.max_steps
        assert tune.train.max_steps == (400 if tune.branches_per_row == 1 else 200)


def test_what_two_arms_have_in_common_is_run_once(plan, tmp_path):
    ran = []

    def command(step, overrides, out):
        out.mkdir(parents=True)
        ran.append((step.command, tuple(o for o in overrides if not o.startswith("init="))))

    for name in ("recipe", "connector_only", "px128", "recipe"):
        train_arm(arm_of(plan, name), 0, tmp_path, Ledger(tmp_path / "runs"), {}, command)
    assert [command for command, _ in ran] == ["align", "pretrain", "tune", "tune", "align", "pretrain", "tune"]
    assert len(set(ran)) == len(ran) - 2  # px128's pretrain and tune differ by their start alone


def test_differences_are_paired_and_stand_in_the_page(plan, tmp_path):
    names = list(plan.figures)
    found = {
        "recipe": [dict.fromkeys(names, 0.5), dict.fromkeys(names, 0.7), dict.fromkeys(names, 0.9)],
        "px128": [dict.fromkeys(names, 0.4), dict.fromkeys(names, 0.6), dict.fromkeys(names, 0.79)],
        "no_regions": [dict.fromkeys(names, 0.9), dict.fromkeys(names, 0.1), dict.fromkeys(names, 0.5)],
    }
    change = differences(found, names[0])["px128"]["difference"]
    # t of 2 degrees of freedom: 4.3027; deviation of (-0.1, -0.1, -0.11) is 0.0057735.
    assert change.mean == pytest.approx(-0.31 / 3) and change.low == pytest.approx(-0.31 / 3 - 4.3027 / 300, abs=1e-5)
    page = tmp_path / "starter.md"
    page.write_text(PAGE)
    write_page(page, plan, found, "mmllm reproduce starter")
    text = page.read_text()
    assert "stale" not in text and text.startswith("# Starter") and text.endswith("More.\n") and MARK.search(text)
    rows = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if line.startswith("| ")}
    assert "70.0 %" in rows["the recipe"] and "(" not in rows["the recipe"]
    assert "(**-10.3**)" in rows[plan.arms["px128"].says]  # clear of zero
    assert "(-20.0)" in rows[plan.arms["no_regions"].says]  # not
    written = {f["name"]: f for f in json.loads((tmp_path / "starter_ablation.json").read_text())["figures"]}
    assert written[f"px128/{names[0]}_over_recipe"]["high"] < 0 and written[f"recipe/{names[0]}"]["n"] == 3


def test_mistakes_are_told_before_anything_runs(tmp_path):
    with pytest.raises(UserError, match="did you mean 'px128'"):
        reproduce(tmp_path / "runs", tmp_path, only=["px12"])
    with pytest.raises(UserError, match="no marks"):
        reproduce(tmp_path / "runs", tmp_path)
