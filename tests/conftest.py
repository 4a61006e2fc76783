"""Shared fixtures, and the rule that no test is skipped silently."""

from __future__ import annotations

import os
import subprocess
import tempfile

import pytest

from mmllm.openmp import short_waits

short_waits()
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

REQUIRE_ALL = bool(os.environ.get("CI") or os.environ.get("MMLLM_REQUIRE_ALL"))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """Where everything must run (CI, `make test`), a test that cannot run for want of a part has failed."""
    outcome = yield
    report = outcome.get_result()
    if report.skipped and REQUIRE_ALL and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        report.outcome = "failed"
        report.longrepr = f"could not run, and everything must run here: {reason}"


def may_mount() -> bool:
    """Whether this user may mount a small disk: mostly root alone, and not in every container."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True)
        except OSError:
            return False
        return done.returncode == 0 and subprocess.run(["umount", folder]).returncode == 0


# What takes longest starts first, so that no process is left with it at the end (`pytest -n 2`).
LONGEST = ("tests/journeys/test_road", "tests/journeys/", "tests/train/test_scale.py", "tests/serve/")


def _length(item) -> int:
    return next((k for k, start in enumerate(LONGEST) if item.nodeid.startswith(start)), len(LONGEST))


def pytest_collection_modifyitems(config, items):
    """Nothing is missing where a user may not mount, so those tests are no failures; they are named at the end."""
    mounts = [item for item in items if item.get_closest_marker("mounts")]
    if mounts and not may_mount():
        config.hook.pytest_deselected(items=mounts)
        items[:] = [item for item in items if item not in mounts]
        config.left_out = [item.nodeid for item in mounts]
    if hasattr(config, "workerinput"):
        items.sort(key=_length)


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = getattr(session.config, "left_out", [])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """What a process of pytest-xdist left out, the one that reports must know."""
    node.config.left_out = getattr(node, "workeroutput", {}).get("left_out", [])


def pytest_terminal_summary(terminalreporter):
    for name in getattr(terminalreporter.config, "left_out", []):
        terminalreporter.write_line(f"LEFT OUT, this user may not mount: {name}", red=True)
    skipped = terminalreporter.stats.get("skipped", [])
    if skipped:
        terminalreporter.write_sep("=", "TESTS THAT DID NOT RUN", red=True, bold=True)
        for report in skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            terminalreporter.write_line(f"{report.nodeid}: {reason}", red=True)


@pytest.fixture(scope="session")
def smollm2() -> str:
    """Folder of the real SmolLM2-135M-Instruct, made once from its wheel and cached outside the clone."""
    from mmllm.data.models import resolve_model

    return resolve_model("starter:smollm2-135m-instruct")


@pytest.fixture(scope="session")
def minilm() -> str:
    """Folder of the real all-MiniLM-L6-v2 sentence encoder."""
    from mmllm.data.models import resolve_model

    return resolve_model("starter:all-minilm-l6-v2")


@pytest.fixture(scope="session")
def efficientnet() -> str:
    """Folder of the ImageNet EfficientNet-lite0."""
    from mmllm.data.models import resolve_model

    return resolve_model("starter:efficientnet-lite0")
