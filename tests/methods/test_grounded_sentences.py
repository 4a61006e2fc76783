"""The oracles of visually grounded sentences: the catalogue's entry 33 (its encoder: tests/towers/test_char_gru.py)."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from mmllm.config import parse_config
from mmllm.errors import UserError
from mmllm.methods.grounded_sentences import Snapshots, VSEHinge
from mmllm.train.align import AlignConfig, align
from tests.align.conftest import settings, world  # noqa: F401

PAIR = ["image", "text"]


def test_all_negatives_divided_by_all_pairs(make_batch, unit):
    a, b = unit(5, 8), unit(5, 8, seed=1)
    s = a @ b.T
    own = s.diagonal()
    total = (0.2 + s - own[:, None]).clamp(min=0) + (0.2 + s.T - own[:, None]).clamp(min=0)
    expected = total.masked_fill(torch.eye(5).bool(), 0).sum() / 25
    batch = make_batch({"image": a, "text": b})
    torch.testing.assert_close(VSEHinge(PAIR)(batch)["loss"].mean(), expected)
    batch.streams["text"].owner, batch.items = torch.arange(5), torch.arange(5)
    torch.testing.assert_close(VSEHinge(PAIR)(batch)["loss"].mean(), expected)


def test_satisfied_margins_have_no_loss_and_no_gradient(make_batch):
    x = torch.eye(4, 8).requires_grad_()
    loss = VSEHinge(PAIR)(make_batch({"image": x, "text": x.detach()}))["loss"].mean()
    loss.backward()
    assert float(loss.detach()) == 0 and not x.grad.any()
    assert float(VSEHinge(PAIR, margin=1.5)(make_batch({"image": x, "text": x}))["loss"].mean().detach()) > 0
    with pytest.raises(UserError, match="margin must be above 0"):
        VSEHinge(PAIR, margin=0)


def test_snapshots_are_the_weights_at_the_ends_of_cycles():
    weight, hook = torch.nn.Parameter(torch.zeros(2)), Snapshots(every=3, count=2)
    hook.groups = {"w": [weight]}
    for step in range(10):
        hook.before_forward(torch.nn.Module(), None, step)
        hook.before_forward(torch.nn.Module(), None, step)  # a second micro-batch
        with torch.no_grad():
            weight.fill_(step + 1.0)
    assert len(hook) == 2 and int(hook.taken) == 3
    seen = []
    for which in range(2):
        with hook.as_it_was(which):
            seen.append(float(weight[0].detach()))
    assert sorted(seen) == [6.0, 9.0] and weight.tolist() == [10.0, 10.0]
    again = Snapshots(every=3, count=2)
    again.groups = {"w": [torch.nn.Parameter(torch.zeros(2))]}
    again.load_state_dict(hook.state_dict())
    assert len(again) == 2 and torch.equal(again.kept_0, hook.kept_0)
    with pytest.raises(UserError, match="every and count"):
        Snapshots(every=0)


@pytest.fixture
def cycles(settings):  # noqa: F811
    settings["streams"]["text"] = {
        "modality": "text",
        "tower": {"model": "tiny:char_gru", "hidden_size": 16, "attention_size": 8},
        "head": {"identity": True},
    }
    both = settings["phases"]["both"]
    both["sources"] = {"things": both["sources"]["things"] | {"captions": "first"}}
    both |= {
        "objectives": [{"type": "vse_hinge", "options": {"pair": PAIR}}],
        "hooks": [{"type": "snapshots", "every": 10, "count": 2}],
        "trains": ["image.head", "text.tower"],
        "train": {
            "max_steps": 30,
            "logging_steps": 10,
            "save_steps": 10,
            "learning_rate": 1e-2,
            "warmup_steps": 0,
            "lr_scheduler_type": "cosine_with_restarts",
            "lr_scheduler_kwargs": {"num_cycles": 3},
        },
    }
    same = {"data": "things_val.jsonl", "streams": PAIR, "by": "label"}
    settings["measures"] = {"last": {"kind": "pairs", **same}, "all": {"kind": "ensemble_pairs", **same}}
    settings["words"] = None
    return settings | {"phases": {"both": both}}


def test_a_run_from_characters_with_its_ensemble(cycles, tmp_path, monkeypatch):
    parsed = parse_config(copy.deepcopy(cycles), AlignConfig)
    out = align(parsed, tmp_path / "run")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [r["loss"] for r in rows if "loss" in r]
    assert losses[-1] < losses[0]
    rates = [r["learning_rate"] for r in rows if "learning_rate" in r]
    assert all(rate < 5e-4 for rate in rates)  # each logged step is the last of a cycle
    found = {f["name"]: f["value"] for f in json.loads((out / "final" / "results.json").read_text())["figures"]}
    assert found["all_text_to_image_map"] > 0.3 and found["all_text_to_image_map"] != found["last_text_to_image_map"]

    class Killed(Exception):
        pass

    forward = VSEHinge.forward

    def dies(self, batch):
        if batch.step == 25:
            raise Killed
        return forward(self, batch)

    monkeypatch.setattr(VSEHinge, "forward", dies)
    with pytest.raises(Killed):
        align(parsed, tmp_path / "killed")
    monkeypatch.setattr(VSEHinge, "forward", forward)
    again = align(parsed, tmp_path / "killed", resume=True)
    resumed = {f["name"]: f["value"] for f in json.loads((again / "final" / "results.json").read_text())["figures"]}
    assert resumed == found


def test_an_ensemble_needs_its_hook(cycles, tmp_path):
    cycles["phases"]["both"] |= {"hooks": [], "train": {"max_steps": 1}}
    with pytest.raises(UserError, match="no phase has the hook 'snapshots'"):
        align(parse_config(cycles, AlignConfig), tmp_path / "run")
