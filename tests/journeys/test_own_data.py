"""A user's own pictures, texts and conversations through the configs of `configs/own`, with real encoders and LLM."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from PIL import Image

from mmllm.report.figures import read_figures

pytestmark = pytest.mark.slow
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (30, 60, 220), "yellow": (240, 220, 40)}


def run(*args: str) -> str:
    done = subprocess.run([sys.executable, "-m", "mmllm.cli", *args], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Plain pictures of four colours with captions and a question each."""
    root = tmp_path_factory.mktemp("own")
    pairs, talks = [], []
    for i in range(32):
        name = list(COLOURS)[i % 4]
        Image.new("RGB", (96, 96), tuple(min(255, c + i) for c in COLOURS[name])).save(root / f"{i}.png")
        pairs.append({"id": f"p{i}", "image": f"{i}.png", "text": f"a {name} picture", "label": name})
        ask = [{"type": "image", "path": f"{i}.png"}, {"type": "text", "text": "Which colour is it?"}]
        answer = [{"type": "text", "text": name}]
        talks.append({"id": f"c{i}", "messages": [{"role": "user", "content": ask},
                                                  {"role": "assistant", "content": answer}]})  # fmt: skip
    for file, rows in (("pairs", pairs[:24]), ("pairs_val", pairs[24:]), ("conversations", talks)):
        (root / f"{file}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return root


def test_from_pairs_to_a_model_that_answers(data, tmp_path):
    for file in ("pairs", "conversations"):
        assert "0 problems" in run("data", "check", str(data / f"{file}.jsonl"))
    own = [f"dataset={data}", "train.logging_steps=10"]
    align, pretrain, tune = (str(tmp_path / n) for n in ("align", "pretrain", "tune"))
    run("align", "configs/own/align.yaml", *own, "phases.pairs.train.max_steps=40",
        "phases.pairs.train.per_device_train_batch_size=16", "--out", align)  # fmt: skip
    figures = {f.name: f.value for f in read_figures(tmp_path / "align" / "final" / "results.json")}
    assert figures["retrieval_r1"] > 0.7  # chance is a quarter
    run("pretrain", "configs/own/pretrain.yaml", *own, f"vision.tower={align}/final/image", "train.max_steps=10",
        "train.per_device_train_batch_size=8", "train.warmup_steps=2", "--out", pretrain)  # fmt: skip
    run("tune", "configs/own/tune.yaml", *own, f"init={pretrain}", "train.max_steps=20", "train.warmup_steps=2",
        "--out", tune)  # fmt: skip
    answers = [run("chat", tune, "-i", str(data / f"{i}.png"), "-q", "Which colour is it?") for i in range(4)]
    right = sum(name in answer for name, answer in zip(COLOURS, answers, strict=True))
    assert right >= 3, answers
