"""docs/add_a_method.md to the letter: its files are written, its commands run, in a package outside of this project."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mmllm.data.build import build_dataset

PAGE = Path(__file__).parents[2] / "docs" / "add_a_method.md"
BLOCK = re.compile(r"^```(\w+)(?: file=(\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_the_walk_through(tmp_path):
    build_dataset("starter.yaml", "fast")
    site = tmp_path / "site"
    env = os.environ | {"PIP_TARGET": str(site), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    env["PIP_NO_BUILD_ISOLATION"] = "false"  # pip reads this as "without"
    env["PYTHONPATH"] = os.pathsep.join([str(site), env.get("PYTHONPATH", "")])
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env["PATH"]])
    said = ""
    for language, file, text in BLOCK.findall(PAGE.read_text(encoding="utf-8")):
        if file:
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).write_text(text, encoding="utf-8")
        else:
            assert language == "sh"
            done = subprocess.run(["sh", "-e"], input=text, capture_output=True, text=True, cwd=tmp_path, env=env)
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
            said += done.stdout
    assert "VSE++" in said and "2 passed" in said
    data = json.loads((tmp_path / "my-docs" / "effects-quick.json").read_text())
    (figure,) = data["figures"]
    assert figure["name"] == "vsepp" and set(figure["arms"]) == {"sum", "hardest"} and len(figure["seeds"]) == 2
    assert figure["verdict"] in ("shown", "noise", "opposite")
    assert "No verdict here counts" in (tmp_path / "my-docs" / "effects-quick.md").read_text()
