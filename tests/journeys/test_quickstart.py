"""The newcomer's journey at its small size: real data, real towers, the real LLM, a real kill, real vLLM."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
MARGIN = 0.08  # by how much yes/no and captions must beat the same questions about other scenes' pictures
NAMES = """retrieval_known_new_vendor_r1 retrieval_new_concept_r1 speech_heldout_voices_r1 speech_real_r1
    pope_accuracy_seen pope_accuracy_new_vendor pope_auc_seen pope_auc_new_vendor caption_recall_seen
    caption_recall_new_vendor side_accuracy_seen box_accuracy_iou50 interleaved_accuracy hear_accuracy wall_seconds
    peak_memory_gb""".split()


def mmllm(*args: str) -> list[str]:
    return [sys.executable, "-m", "mmllm.cli", *args]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A quickstart that is killed while it tunes and started again."""
    out = tmp_path_factory.mktemp("journey") / "quickstart"
    command = mmllm("quickstart", "--fast", "--out", str(out))
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 1200
    while not list(out.glob("tune/checkpoints/checkpoint-*[0-9]")):
        assert first.poll() is None, "the quickstart ended before it tuned"
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    aligned = (out / "align.done").stat().st_mtime_ns
    second = subprocess.run(command, capture_output=True, text=True)
    assert second.returncode == 0, second.stdout[-3000:] + second.stderr[-3000:]
    assert (out / "align.done").stat().st_mtime_ns == aligned  # finished steps were not done again
    assert "mmllm tune configs/starter/tune.yaml" in second.stdout and "--resume" in second.stdout
    assert "pope_accuracy_seen\t" in second.stdout and "report: " in second.stdout
    return out


@pytest.fixture(scope="module")
def figures(run) -> dict[str, dict]:
    results = json.loads((run / "results.json").read_text())
    assert results["sources"] and results["seed"] == 0
    return {f["name"]: f for f in results["figures"]}


def test_every_figure_of_the_table_is_there(figures):
    assert not [n for n in NAMES if figures.get(n, {}).get("value") is None]


@pytest.mark.parametrize("name", ["pope_accuracy_seen", "caption_recall_seen"])
def test_what_it_says_depends_on_what_it_sees(figures, name):
    over = figures[f"{name}_over_shuffled"]
    assert over["low"] > 0
    assert over["value"] > MARGIN


def test_retrieval_is_far_above_chance(figures):
    for name in ("retrieval_known_new_vendor_r1", "speech_heldout_voices_r1"):
        assert figures[name]["value"] > 5 * figures[name]["chance"]


def test_the_report_is_one_page_with_pictures_and_sounds(run):
    page = (run / "report.html").read_text()
    assert page.count("<svg") > 5 and "<audio" in page and "pope_accuracy_seen" in page
    assert "http://" not in page.replace("http://www.w3.org", "") and "<script" not in page


def test_served_by_real_vllm_with_the_same_tokens(run):
    served = {f["name"]: f for f in json.loads((run / "serve.json").read_text())["figures"]}
    assert served["serve_parity"]["value"] == 1.0


def test_chat_answers_about_a_held_out_picture(run):
    item = json.loads((run / "eval" / "predictions.jsonl").read_text().splitlines()[0])
    command = mmllm("chat", str(run / "tune"), "-i", item["media"][0], "-q", "What is in the picture?")
    for decode in ("greedy", "vcd:alpha=0.5", "ritual"):
        done = subprocess.run([*command, "--decode", decode], capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.strip(), done.stderr


def test_another_size_in_the_same_folder_is_refused(run):
    done = subprocess.run(mmllm("quickstart", "--out", str(run)), capture_output=True, text=True)
    assert done.returncode == 2 and "--restart" in done.stderr and "Traceback" not in done.stderr
