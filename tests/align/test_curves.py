"""Measures during training: their curves stand in the report, and the training does not notice them."""

from __future__ import annotations

import copy

import pytest
from PIL import Image

from mmllm.blocks.augment import place_cutout
from mmllm.config import parse_config
from mmllm.report.figures import read_figures
from mmllm.report.runs import run_curves
from mmllm.train.align import AlignConfig, AlignStage, align
from mmllm.train.align_measures import plain_embeddings
from mmllm.train.run import RunFolder


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("MMLLM_CACHE", str(tmp_path_factory.mktemp("cache")))


def run(settings, out, **kwargs):
    return align(parse_config(copy.deepcopy(settings), AlignConfig), out, **kwargs)


def test_retrieval_curves(settings, tmp_path):
    settings["streams"]["image"]["head"] = {"norm": True, "dropout": 0.2}
    settings["phases"] = {"both": settings["phases"]["both"]}
    settings["phases"]["both"]["train"] = {"max_steps": 40, "logging_steps": 20}
    settings["train"] |= {"lr_scheduler_type": "constant", "warmup_steps": 0}
    settings["measures"] = {k: settings["measures"][k] for k in ("things", "sounds")}
    plain = run(settings, tmp_path / "plain")
    settings["measures"]["things"]["every"] = 10
    seen = run(settings, tmp_path / "seen")
    for name in ("image/model", "heads"):
        one, two = (p / "final" / f"{name}.safetensors" for p in (plain, seen))
        assert one.read_bytes() == two.read_bytes(), name
    curves = run_curves(seen)
    assert [s for s, _ in curves["both", "things_r1"]] == [10, 20, 30] and ("both", "sounds_r1") not in curves
    assert [s for s, _ in curves["both", "loss"]] == [20, 40]
    figures = {f.name: f.value for f in read_figures(seen / "final" / "results.json")}
    assert figures == {f.name: f.value for f in read_figures(plain / "final" / "results.json")}
    assert (seen / "report.html").read_text().count("things_r1") > (plain / "report.html").read_text().count(
        "things_r1"
    )
    # A point of a curve is what a run that ends there finds.
    settings["phases"]["both"]["train"]["max_steps"] = 10
    ended = {f.name: f.value for f in read_figures(run(settings, tmp_path / "short") / "final" / "results.json")}
    for name in ("things_r1", "things_r5", "things_from_text_r1", "things_from_text_r5"):
        assert curves["both", name][0] == (10, pytest.approx(ended[name]))


def test_features_of_a_tower_that_has_trained_since_are_not_the_old_ones(settings, world, tmp_path):
    both = settings["phases"]["both"]
    both |= {"sources": {"things": both["sources"]["things"]}, "objectives": both["objectives"][:1]}
    both |= {"trains": ["image.head", "text.head"], "train": {"max_steps": 2}}
    settings["measures"] = {"things": settings["measures"]["things"]}
    settings["phases"] = {"one": both, "two": both | {"trains": ["image", "text.head"], "train": {"max_steps": 20}}}
    config = parse_config(settings, AlignConfig)
    stage = AlignStage(config, RunFolder.open(tmp_path / "run", "align", config))
    records = stage.records("things_val.jsonl")
    plain_embeddings(stage, config.measures["things"], records, "embedding")  # these stand in the cache
    for number, phase in enumerate(config.phases.values()):
        stage.train_phase(number, phase)
    got = plain_embeddings(stage, config.measures["things"], records, "embedding")[0]
    expected = stage.model.embed("image", [place_cutout(Image.open(r["image"]), 64) for r in records])
    assert float((got * expected).sum(1).min()) > 0.999
