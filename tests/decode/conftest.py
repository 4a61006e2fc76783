"""A tiny LLaVA, made once, and a fresh decoder on it."""

import pytest
from tiny_llava import tiny_llava

from mmllm.decode import Decoder


@pytest.fixture(scope="session")
def llava():
    return tiny_llava()


@pytest.fixture
def decoder(llava):
    return Decoder(*llava)
