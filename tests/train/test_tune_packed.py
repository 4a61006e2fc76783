"""`mmllm tune` on packed rows: it learns, resumes bit by bit, and says how full its rows are."""

import json
import shutil

import numpy as np
import pytest
import torch
from test_tune import config, moved, own_cache, tune, weights, world  # noqa: F401

from mmllm.errors import UserError
from mmllm.model import load_model


def packed(world, **changes):  # noqa: F811
    train = {"llm": "lora", "per_device_train_batch_size": 1, **changes.pop("train", {})}
    return config(world, pack=256, max_length=200, lora={"r": 2, "dropout": 0.1}, train=train, **changes)


def test_a_packed_run_resumes_with_the_same_bits_and_reports_its_fill(world, tmp_path, capsys):  # noqa: F811
    settings = packed(world)
    whole = tune("tune", settings, tmp_path / "whole")
    fill = json.loads((whole / "run.json").read_text())["packing_fill"]
    assert 0.5 < fill <= 1 and f"{fill:.1%} full" in capsys.readouterr().out
    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "final")
    for late in ("checkpoint-4", "checkpoint-6"):
        shutil.rmtree(cut / "checkpoints" / late)
    tune("tune", settings, cut, resume=True)
    assert moved(weights(whole), weights(cut)) == set()
    model, _ = load_model(whole)
    assert model.language_model.config._attn_implementation != "mmllm_packed"


def test_packed_and_padded_runs_learn_alike(world, tmp_path):  # noqa: F811
    """With all records in each batch the two are the same step, up to rounding."""
    base = dict(max_steps=3, llm="full", learning_rate=1e-3)
    one = config(world, pack=8192, branches_per_row=None, train={**base, "per_device_train_batch_size": 1})
    many = config(world, branches_per_row=None, train={**base, "per_device_train_batch_size": 26})
    runs = [tune("tune", c, tmp_path / name) for c, name in ((one, "packed"), (many, "padded"))]
    losses = [[json.loads(x)["loss"] for x in (r / "metrics.jsonl").read_text().splitlines()[:3]] for r in runs]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
    a, b = (weights(r) for r in runs)
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=2e-3, rtol=0.1, msg=name)


def test_epochs_are_counted_in_packed_rows(world, tmp_path):  # noqa: F811
    run = tune(
        "tune", packed(world, train={"max_steps": None, "num_train_epochs": 1, "save_steps": 99}), tmp_path / "r"
    )
    rows = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    assert 5 < max(r["step"] for r in rows if "step" in r) < 26


def test_rows_that_cannot_hold_a_conversation_are_refused(world, tmp_path):  # noqa: F811
    with pytest.raises(UserError, match="max_length") as e:
        tune("tune", config(world, pack=100), tmp_path / "x")
    assert "\n" not in str(e.value)
