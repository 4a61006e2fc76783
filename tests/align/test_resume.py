"""A real run killed in mid-epoch ends, resumed, with the weights of an uninterrupted one: bit for bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import yaml

import mmllm

SCRIPT = Path(__file__).parent / "resume_run.py"


def test_a_killed_run_goes_on_as_if_nothing_had_been(settings, tmp_path):
    settings["streams"]["image"]["head"] = {"norm": True, "dropout": 0.2}
    phase = settings["phases"]["both"]
    phase["sources"] = {"things": phase["sources"]["things"] | {"sampler": "shuffle"}}
    infonce = {"type": "infonce", "weight": {"start": 1.0, "end": 0.2}, "options": {"pair": ["image", "text"]}}
    phase["objectives"] = [infonce, {"type": "remembering", "weight": 0.5}]
    phase |= {"trains": ["image", "text.head"], "hooks": ["killer"], "chunk_size": 5}
    phase["train"] = {"max_steps": 11, "save_steps": 3, "logging_steps": 2}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings | {"phases": {"both": phase}, "measures": {}}))

    def run(out, *more, **env):
        env = {"MMLLM_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1", **env}
        env["PYTHONPATH"] = str(Path(mmllm.__file__).parents[1])
        command = [sys.executable, str(SCRIPT), "align", str(tmp_path / "c.yaml"), "--out", str(tmp_path / out), *more]
        return subprocess.run(command, capture_output=True, text=True, env=os.environ | env)

    whole = run("whole")
    assert whole.returncode == 0, whole.stderr[-2000:]
    assert run("cut", KILL_AT="5").returncode == -signal.SIGKILL  # an epoch has four steps, the last checkpoint is at 3
    kept = tmp_path / "cut" / "checkpoints" / "both"
    assert [p.name for p in kept.iterdir()] == ["checkpoint-3"] and not (tmp_path / "cut" / "final").exists()
    again = run("cut", "--resume")
    assert again.returncode == 0, again.stderr[-2000:]
    for name in ("image/model", "heads"):
        one, two = (tmp_path / r / "final" / f"{name}.safetensors" for r in ("whole", "cut"))
        assert one.read_bytes() == two.read_bytes(), name
    last = [tmp_path / r / "checkpoints" / "both" / "checkpoint-11" / "model.safetensors" for r in ("whole", "cut")]
    assert last[0].read_bytes() == last[1].read_bytes()  # teacher, queue, centres and parameter, too
