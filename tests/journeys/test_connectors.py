"""`mmllm align`, `pretrain`, `tune`, `eval` with each connector: seeing beats guessing by the margins of a config."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import mmllm
from mmllm.data.build import build_dataset
from mmllm.data.chat_batches import record_media
from mmllm.data.records import read_records
from mmllm.report.figures import read_figures

pytestmark = pytest.mark.slow
CONFIGS = Path(mmllm.__file__).parents[1] / "configs" / "connectors"


def run(*args: str) -> None:
    done = subprocess.run([sys.executable, "-m", "mmllm.cli", *args], capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The medium starter's conversations about pictures."""
    source, root = build_dataset("starter.yaml", "medium"), tmp_path_factory.mktemp("connectors")
    for stage in ("pretrain", "tune"):
        rows = []
        for record in read_records(source / stage / "train.jsonl"):
            if any(kind != "image" for kind, _ in record_media(record)):
                continue
            for part in (p for m in record["messages"] for p in m["content"]):
                if "path" in part:
                    part["path"] = os.path.abspath(part["path"])
            rows.append(json.dumps(record))
        assert len(rows) >= 400, stage
        (root / f"{stage}.jsonl").write_text("\n".join(rows) + "\n")
    return root


@pytest.mark.parametrize("connector", ["mlp", "qformer", "perceiver"])
def test_what_is_seen_beats_what_is_guessed_by_the_stated_margin(connector, data, tmp_path):
    align, pretrain, tune = (tmp_path / stage for stage in ("align", "pretrain", "tune"))
    run("align", str(CONFIGS / f"align_{connector}.yaml"), "--out", str(align))
    where = f"dataset={data}"
    run("pretrain", str(CONFIGS / f"pretrain_{connector}.yaml"), where, f"init={align}", "--out", str(pretrain))
    run("tune", str(CONFIGS / f"tune_{connector}.yaml"), where, f"init={pretrain}", "--out", str(tune))
    assert json.loads((tune / "final" / "config.json").read_text())["vision_connector"]["type"] == connector
    stated = yaml.safe_load((CONFIGS / f"tune_{connector}.yaml").read_text())["margins"]
    assert set(stated) == {"caption_recall_seen", "pope_accuracy_seen", "box_accuracy_iou50", "interleaved_accuracy"}
    asked = ("--tasks", ",".join(name.split("_")[0] for name in stated), "--limit", "100", "--blind")
    run("eval", "--model", str(tune), "--data", "starter:medium", *asked)
    figures = {f.name: f for f in read_figures(tune / "eval" / "results.json")}
    for name, margin in stated.items():
        over = figures[f"{name}_over_blind"]
        assert over.target == margin and over.verdict == "met", (name, margin, over.value, over.low)
        assert over.low is not None and over.low > 0, (name, over)
