"""The wheel is complete and runs in a fresh environment; imports between rooms run downhill only."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# The floors of the house: a room imports from the floors below its own, never from beside or above.
FLOORS = [
    {"errors", "config", "contracts", "registry", "openmp", "malloc", "collector"},
    {"blocks", "report"},
    {"towers", "connectors", "data"},
    {"align", "model", "decode"},
    {"evaluate"},
    {"train"},
    {"methods", "serve"},
    {"starter", "reproduce"},
    {"cli"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def source_files() -> list[tuple[str, Path]]:
    """(room, file) of every Python file of the package."""
    found = []
    for folder, below, names in os.walk(ROOT / "mmllm", followlinks=True):
        below[:] = [b for b in below if not b.startswith((".", "__"))]
        for name in names:
            if name.endswith(".py"):
                file = Path(folder) / name
                found.append((file.relative_to(ROOT / "mmllm").with_suffix("").parts[0], file))
    return found


def imported_rooms(file: Path) -> list[tuple[int, str]]:
    """(line, room) of every import from mmllm, those inside functions and type-checking blocks too."""
    rooms = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            rooms.append((node.lineno, "."))
            continue
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{a.name}" for a in node.names] if node.module == "mmllm" else [str(node.module)]
        else:
            continue
        rooms += [(node.lineno, n.split(".")[1]) for n in names if n.startswith("mmllm.") and n != "mmllm.__version__"]
    return rooms


def test_every_room_has_a_floor():
    rooms = {room for room, _ in source_files()} - {"__init__"}
    assert rooms == set(FLOOR)


def test_imports_run_downhill():
    uphill = []
    for room, file in source_files():
        for line, target in imported_rooms(file):
            where = f"{file.relative_to(ROOT)}:{line}: {room} imports {target}"
            if target == ".":
                uphill.append(f"{where} (relative; write the full name)")
            elif target != room and FLOOR.get(target, 99) >= FLOOR.get(room, -1) and FLOOR.get(target) != 0:
                uphill.append(where)
    assert not uphill, "\n".join(uphill)


def test_blocks_know_nothing_of_mmllm():
    """Floor 1's torch pieces stand alone, so that they can be read and tested by themselves."""
    allowed = {"blocks", "errors", "contracts", "registry"}
    wrong = [(f, line, t) for room, f in source_files() if room == "blocks" for line, t in imported_rooms(f)]
    assert not [w for w in wrong if w[2] not in allowed]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from the source distribution, which is built from this tree."""
    out = tmp_path_factory.mktemp("dist")
    done = subprocess.run([sys.executable, "-m", "build", "--outdir", out, ROOT], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return next(out.glob("*.whl"))


@pytest.mark.slow
def test_wheel_holds_the_whole_package_once(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert len(names) == len(set(names))
    tree = {f"mmllm/{file.relative_to(ROOT / 'mmllm').as_posix()}" for _, file in source_files()}
    for top in ("configs", "data_recipes"):
        files = [p for p in (ROOT / top).rglob("*") if p.is_file()]
        tree |= {f"mmllm/{p.relative_to(ROOT).as_posix()}" for p in files}
    tree.add("mmllm/py.typed")
    packed = {n for n in names if n.startswith("mmllm/")}
    assert packed == tree
    assert any(n.endswith("licenses/LICENSE") for n in names)
    assert not [n for n in names if n.startswith(("tests/", "runs/", "benchmarks/"))]


@pytest.mark.slow
def test_wheel_runs_in_a_fresh_environment(wheel, tmp_path):
    """With only what parsing a config needs, a command finds its packaged config, reads it, and says what is wrong."""
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    python, mmllm = venv / "bin/python", venv / "bin/mmllm"
    pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, "--no-deps", wheel], check=True)
    subprocess.run([*pip, "click", "pydantic", "omegaconf", "pyyaml"], check=True)
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}

    def run(*command) -> subprocess.CompletedProcess:
        return subprocess.run([*map(str, command)], cwd=tmp_path, env=clean, capture_output=True, text=True)

    assert run(mmllm, "--version").stdout.split()[-1] == run(python, "-m", "mmllm.cli", "--version").stdout.split()[-1]
    done = run(mmllm, "align", "configs/starter/align.yaml", "embeding_dim=3")
    assert done.returncode == 2, done.stderr
    assert "site-packages" in done.stderr and "did you mean 'embedding_dim'?" in done.stderr
    listed = run(python, "-c", "from mmllm.config import find_config; print(find_config('starter/align'))")
    assert Path(listed.stdout.strip()).is_relative_to(venv)
