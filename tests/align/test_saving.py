"""Saving memory or time in training changes nothing: gradient checkpointing and torch.compile by config."""

from __future__ import annotations

import copy
import json

import pytest

from mmllm.align import load_align
from mmllm.config import parse_config
from mmllm.errors import UserError
from mmllm.train.align import AlignConfig, align


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("MMLLM_CACHE", str(tmp_path_factory.mktemp("cache")))


def losses(settings, out, trains, **train):
    """The logged losses of a few steps in float32."""
    settings = copy.deepcopy(settings)
    both = settings["phases"]["both"]
    both |= {"sources": {"things": both["sources"]["things"]}, "objectives": both["objectives"][:1], "trains": trains}
    both["train"] = {"max_steps": 4, "logging_steps": 1, **train}
    settings |= {"phases": {"both": both}, "measures": {}, "dtype": "float32"}
    run = align(parse_config(settings, AlignConfig), out)
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_gradient_checkpointing_runs_layers_again(settings, tmp_path, monkeypatch):
    from mmllm.blocks.transformer import EncoderLayer

    trains = ["image", "text"]
    settings["streams"]["image"]["tower"]["layers"] = 2
    plain = losses(settings, tmp_path / "plain", trains)
    calls = []
    forward = EncoderLayer.forward
    monkeypatch.setattr(EncoderLayer, "forward", lambda *a, **k: calls.append(1) or forward(*a, **k))
    saved = losses(settings, tmp_path / "saved", trains, gradient_checkpointing=True)
    assert saved == pytest.approx(plain, rel=1e-5) and len(calls) == 4 * 2 * 2  # steps, layers, forward and again
    assert load_align(tmp_path / "saved").tower("image") is not None


def test_a_tower_without_layers_is_named(settings, tmp_path):
    both = settings["phases"]["both"]
    both |= {
        "sources": {"sounds": both["sources"]["sounds"]},
        "objectives": both["objectives"][1:],
        "trains": ["audio"],
    }
    both["train"] = {"max_steps": 1, "gradient_checkpointing": True}
    with pytest.raises(UserError, match="tower of 'audio' .TinyAudioTower. knows no gradient checkpointing"):
        align(parse_config(settings | {"phases": {"both": both}, "measures": {}}, AlignConfig), tmp_path / "run")


@pytest.mark.slow
def test_a_compiled_step_has_the_same_losses(settings, tmp_path):
    trains = ["image", "text.head"]
    plain = losses(settings, tmp_path / "plain", trains)
    compiled = losses(settings, tmp_path / "compiled", trains, torch_compile=True)
    assert compiled == pytest.approx(plain, rel=1e-4)
