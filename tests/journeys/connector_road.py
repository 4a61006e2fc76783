"""`mmllm align`, `pretrain`, `tune`, `eval` with one connector, from its four configs; what its margins come to.

One test file for each connector, so that the tests' processes share them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import yaml

import mmllm
from mmllm.data.build import build_dataset
from mmllm.data.chat_batches import record_media
from mmllm.data.records import read_records
from mmllm.report.figures import Figure, read_figures

CONFIGS = Path(mmllm.__file__).parents[1] / "configs" / "connectors"
# Scenes asked about: enough that what a margin is about lies outside of chance.
LIMITS = {"pope": 60, "caption": 60, "interleaved": 60, "box": 300}


def mmllm_run(*args: str) -> None:
    done = subprocess.run([sys.executable, "-m", "mmllm.cli", *args], capture_output=True, text=True, timeout=2400)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def picture_talks(source: Path, root: Path) -> Path:
    """A dataset of the medium starter's conversations about pictures."""
    for stage in ("pretrain", "tune"):
        rows = []
        files = sorted((source / stage).glob("*.jsonl"))
        for record in (r for file in files for r in read_records(file)):
            if any(kind != "image" for kind, _ in record_media(record)):
                continue
            for part in (p for m in record["messages"] for p in m["content"]):
                if "path" in part:
                    part["path"] = os.path.abspath(part["path"])
            rows.append(json.dumps(record))
        assert len(rows) >= 1600, stage
        (root / f"{stage}.jsonl").write_text("\n".join(rows) + "\n")
    return root


def road(connector: str, folder: Path) -> tuple[dict[str, float], dict[str, Figure]]:
    """The margins that the connector's config states, and the figures of the model that its road ends with."""
    data = folder / "data"
    data.mkdir()
    picture_talks(build_dataset("starter.yaml", "medium"), data)
    align, pretrain, tune = (folder / stage for stage in ("align", "pretrain", "tune"))
    mmllm_run("align", str(CONFIGS / f"align_{connector}.yaml"), "--out", str(align))
    where = f"dataset={data}"
    mmllm_run("pretrain", str(CONFIGS / f"pretrain_{connector}.yaml"), where, f"init={align}", "--out", str(pretrain))
    mmllm_run("tune", str(CONFIGS / f"tune_{connector}.yaml"), where, f"init={pretrain}", "--out", str(tune))
    assert json.loads((tune / "final" / "config.json").read_text())["vision_connector"]["type"] == connector
    stated = yaml.safe_load((CONFIGS / f"tune_{connector}.yaml").read_text())["margins"]
    tasks = {name.split("_")[0]: LIMITS[name.split("_")[0]] for name in stated}
    figures: dict[str, Figure] = {}
    for limit in sorted(set(tasks.values())):
        asked = ",".join(task for task, n in tasks.items() if n == limit)
        out = folder / f"eval{limit}"
        asks = ("--tasks", asked, "--limit", str(limit), "--blind", "--out", str(out))
        mmllm_run("eval", "--model", str(tune), "--data", "starter:medium", *asks)
        figures |= {f.name: f for f in read_figures(out / "results.json")}
    return stated, figures


def check(connector: str, folder: Path) -> None:
    """What is seen beats what is guessed without pictures, by the stated margin and outside of chance."""
    stated, figures = road(connector, folder)
    assert set(stated) == {"caption_recall_seen", "pope_accuracy_seen", "box_accuracy_iou50", "interleaved_accuracy"}
    over = {name: figures[f"{name}_over_blind"] for name in stated}
    told = {name: (f.value, f.low, f.high, f.target) for name, f in over.items()}
    assert all(over[name].target == margin for name, margin in stated.items()), told
    assert not [n for n, f in over.items() if f.verdict != "met" or f.low is None or f.low <= 0], told
