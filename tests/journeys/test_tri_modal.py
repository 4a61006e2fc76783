"""Pictures, spoken words and names aligned together on the starter data, at its small size, as the config promises."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.slow
CONFIG = Path(__file__).parents[2] / "configs" / "starter" / "tri_modal.yaml"


def mmllm(*args: str) -> None:
    done = subprocess.run([sys.executable, "-m", "mmllm.cli", *args], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_every_pair_beats_chance_by_the_factor_of_its_config(tmp_path):
    mmllm("data", "build", "data_recipes/starter.yaml", "--size", "fast")
    mmllm("align", str(CONFIG), "dataset=starter:fast", "--out", str(tmp_path / "run"))
    results = json.loads((tmp_path / "run" / "final" / "results.json").read_text())
    figures = {f["name"]: f for f in results["figures"]}
    factors = yaml.safe_load(CONFIG.read_text())["measures"]["new"]["times_chance"]
    assert len(factors) == 6  # both directions of all three pairs
    for name, factor in factors.items():
        figure = figures[f"new_{name}"]
        assert figure["verdict"] == "met" and figure["target"] == pytest.approx(factor * figure["chance"]), figure
        assert figure["value"] >= factor * figure["chance"] and figure["value"] > figure["control_high"], figure
    records = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["infonce:image:audio"] < records[0]["infonce:image:audio"]
