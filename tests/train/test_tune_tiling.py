"""Runs with tiling: cached and running towers agree, the separator trains with the connector, tiles are really seen."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from test_tune import config, own_cache, turn, weights, world  # noqa: F401

from mmllm.errors import UserError
from mmllm.model import load_model
from mmllm.train.tune import tune


@pytest.fixture
def large(world, tmp_path):  # noqa: F811
    """Pictures of several shapes, most of them larger than the tower's."""
    rng, records = np.random.default_rng(0), []
    for i, size in enumerate([(32, 32), (96, 64), (60, 200), (64, 64), (33, 31), (128, 32)]):
        Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), np.uint8)).save(tmp_path / f"{i}.png")
        asked = turn("user", {"type": "image", "path": f"{i}.png"}, "What?")
        records.append({"id": str(i), "messages": [asked, turn("assistant", "a dog")]})
    (tmp_path / "large.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return {"dataset": str(tmp_path), "data": "large.jsonl", "tiling": {"max_tiles": 4}, "audio": {}}


def losses(run):
    return [json.loads(x)["loss"] for x in (run / "metrics.jsonl").read_text().splitlines()[:2]]


def test_cached_tiles_and_running_the_tower_give_the_same_loss(world, large, tmp_path):  # noqa: F811
    frozen = {"max_steps": 2, "learning_rate": 0.0, "weight_decay": 0.0}
    cached = tune("pretrain", config(world, train=frozen, **large), tmp_path / "a")
    live = tune("pretrain", config(world, train={**frozen, "vision": "full"}, **large), tmp_path / "b")
    packed = tune("pretrain", config(world, train=frozen, pack=512, **large), tmp_path / "c")
    np.testing.assert_allclose(losses(cached), losses(live), rtol=2e-2)  # features may be kept in bfloat16
    assert np.isfinite(losses(packed)).all()


def test_the_separator_trains_and_a_run_resumes_with_the_same_bits(world, large, tmp_path):  # noqa: F811
    settings = config(world, **large)
    start = tune("pretrain", config(world, train={"max_steps": 1, "learning_rate": 0.0}, **large), tmp_path / "zero")
    whole = tune("pretrain", settings, tmp_path / "whole")
    before, after = weights(start), weights(whole)
    moved = {k.split(".")[0] for k in before if not torch.equal(before[k], after[k])}
    assert moved == {"vision_connector", "tile_rows"}
    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "final")
    shutil.rmtree(cut / "checkpoints" / "checkpoint-6")
    tune("pretrain", settings, cut, resume=True)
    assert all(torch.equal(after[k], v) for k, v in weights(cut).items())
    with pytest.raises(UserError, match="cuts pictures already"):
        tune("tune", config(world, **{**large, "init": str(whole), "llm": None, "vision": {}}), tmp_path / "twice")
    more = {**large, "init": str(whole), "llm": None, "vision": {}, "tiling": None}
    second = tune("tune", config(world, train={"llm": "lora", "max_steps": 2}, **more), tmp_path / "tune")
    model, processor = load_model(second)
    assert model.tile_rows is not None and processor.tiles.max_tiles == 4


def test_a_picture_whose_tiles_do_not_fit_the_row_is_told(world, large, tmp_path):  # noqa: F811
    words = r"large.jsonl:2 \(id '1'\): the first turn ends after [\d,]+ tokens, max_length is 60"
    with pytest.raises(UserError, match=words):
        tune("pretrain", config(world, max_length=60, **large), tmp_path / "run")
