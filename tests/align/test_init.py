"""Beginning with an aligned model, and temperatures that a later phase keeps."""

from __future__ import annotations

import copy

import pytest
import torch
from tower_families import FAMILIES

from mmllm.align import load_align
from mmllm.config import parse_config
from mmllm.errors import UserError
from mmllm.train.align import AlignConfig, AlignStage, align
from mmllm.train.run import RunFolder


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("MMLLM_CACHE", str(tmp_path_factory.mktemp("cache")))


def test_a_run_begins_with_another(settings, tmp_path):
    settings["phases"] = {"both": settings["phases"]["both"]}
    settings["phases"]["both"]["train"]["max_steps"] = 5
    settings["measures"] = {}
    first = align(parse_config(copy.deepcopy(settings), AlignConfig), tmp_path / "first")
    for name in ("image", "text", "audio"):
        settings["streams"][name] = {"modality": settings["streams"][name]["modality"]}
    made = AlignStage(parse_config(copy.deepcopy(settings) | {"init": str(first)}, AlignConfig)).model
    source = load_align(first)
    for name, items in (("text", ["red square", "blue bar"]),):
        torch.testing.assert_close(made.embed(name, items), source.embed(name, items))
    assert torch.equal(made.heads["image"][2].weight, source.heads["image"][2].weight)
    assert torch.equal(made.logit_scale["audio:text"], source.logit_scale["audio:text"])
    second = align(parse_config(settings | {"init": str(first)}, AlignConfig), tmp_path / "second")
    assert load_align(second).logit_scale["image:text"] != source.logit_scale["image:text"]


def test_a_stream_without_a_tower_is_named(settings, tmp_path):
    settings["streams"]["image"] = {"modality": "vision"}
    with pytest.raises(UserError, match="needs 'tower', 'tower_of' or 'of'"):
        parse_config(copy.deepcopy(settings), AlignConfig)
    family = FAMILIES["clap"]  # streams audio and text
    family.write(tmp_path / "clap")
    with pytest.raises(UserError, match="stream 'image' has no tower; 'audio, text' come from init"):
        AlignStage(parse_config(settings | {"init": str(tmp_path / "clap")}, AlignConfig))


def test_a_tower_of_another_modality_is_no_streams_tower(settings):
    settings["streams"]["film"] = {"modality": "video", "tower_of": "image", "head": {}}
    with pytest.raises(UserError, match="'film' is video, and the tower of 'image' reads vision"):
        parse_config(settings, AlignConfig)


def test_the_sigmoid_loss_has_its_own_start_after_the_softmax_loss(settings, tmp_path):
    both = settings["phases"]["both"]
    both["train"]["max_steps"] = 2
    one, two = copy.deepcopy(both), copy.deepcopy(both)
    one["objectives"][1]["type"] = "infonce"
    settings |= {"phases": {"one": one, "two": two}, "measures": {}}
    config = parse_config(settings, AlignConfig)
    stage = AlignStage(config, RunFolder.open(tmp_path / "run", "align", config))
    stage.train_phase(0, config.phases["one"])
    assert float(stage.model.logit_bias["audio:text"].detach()) == 0.0
    stage.train_phase(1, config.phases["two"])
    assert float(stage.model.logit_bias["audio:text"].detach()) == pytest.approx(-10.0, abs=0.1)


def test_a_later_phase_keeps_the_temperature_of_the_sigmoid_loss(settings, tmp_path):
    both = settings["phases"]["both"]
    both["train"]["max_steps"] = 3
    settings |= {"phases": {"one": copy.deepcopy(both), "two": copy.deepcopy(both)}, "measures": {}}
    config = parse_config(settings, AlignConfig)
    stage = AlignStage(config, RunFolder.open(tmp_path / "run", "align", config))
    stage.train_phase(0, config.phases["one"])
    with torch.no_grad():
        stage.model.logit_bias["audio:text"].fill_(-3.0)
    stage.train_phase(1, config.phases["two"])
    assert -3.1 < float(stage.model.logit_bias["audio:text"].detach()) < -2.9
