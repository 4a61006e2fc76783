"""ProtoCLIP's oracles: the catalogue's entry 22."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from mmllm.config import parse_config
from mmllm.errors import UserError
from mmllm.methods.protoclip import ProtoCLIP
from mmllm.train.align import AlignConfig, align
from tests.align.conftest import settings, world  # noqa: F401

PAIR = ["image", "text"]
N, D = 12, 6


class Same(torch.nn.Module):
    """Heads that change nothing, so that prototypes are made of the embeddings."""

    def forward(self, x):
        return x


def objective(features, **options):
    """Ready for items 0..N-1 with these features of the two streams (and of the teacher)."""
    made = ProtoCLIP(PAIR, out_dim=D, teacher="words" if len(features) > 2 else None, **options)
    made.heads = torch.nn.ModuleList([Same(), Same()])
    made.prepare(SimpleNamespace(source=SimpleNamespace(records=[None] * N)))
    made.form([(x, torch.ones(N, dtype=torch.bool)) for x in features])
    return made


@pytest.fixture
def features(unit):
    return unit(N, D), unit(N, D, seed=1)


def losses(made, a, b, make_batch, items=None):
    items = torch.arange(len(a)) if items is None else items
    return made(make_batch({"image": a, "text": b}, items=items))


@pytest.mark.parametrize("translated", [True, False])
def test_a_turned_stream_changes_nothing_with_back_translation(make_batch, features, translated):
    a, b = features
    turn = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(2)))[0]
    options = {"prototypes": 4, "back_translation": translated}
    before = losses(objective((a, b), **options), a, b, make_batch)["loss"]
    after = losses(objective((a @ turn, b), **options), a @ turn, b, make_batch)["loss"]
    assert torch.allclose(before, after, atol=1e-5) == translated


def test_soft_targets_of_equally_long_centroids_become_hard_ones(make_batch):
    a = torch.eye(D).repeat(2, 1)  # twelve items in six clusters of two equal ones
    soft, hard = (objective((a, a), prototypes=6, temperature=t) for t in (0.01, 0.0))
    one, two = (losses(o, a, a, make_batch)["loss"] for o in (soft, hard))
    torch.testing.assert_close(one, two)
    assert not torch.allclose(losses(objective((a, a), prototypes=6, temperature=1.0), a, a, make_batch)["loss"], two)


def test_one_item_each_is_discrimination_of_instances(make_batch, features):
    a, b = features
    made = objective((a, b), prototypes=N, temperature=0.0)
    expected = 0.5 * sum(F.cross_entropy(made.scale * x @ x.T, torch.arange(N), reduction="none") for x in (a, b))
    torch.testing.assert_close(losses(made, a, b, make_batch)["loss"], expected)


def test_prototypes_have_no_gradient_and_rows_do(make_batch, features):
    a, b = (x.clone().requires_grad_() for x in features)
    made = objective((a, b), prototypes=4)
    assert not made.translated.requires_grad and not made.centroids.requires_grad
    losses(made, a, b, make_batch)["loss"].sum().backward()
    assert a.grad.abs().sum() > 0 and b.grad.abs().sum() > 0
    # All of it goes through the logits: with constants for prototypes the gradient is the same.
    x = features[0].clone().requires_grad_()
    made.classified(x, made.cluster[1], 0, 1).sum().mul(0.5).backward()
    torch.testing.assert_close(x.grad, a.grad)


def test_written_out(make_batch, features):
    a, b = features
    made = objective((a, b), prototypes=4, temperature=0.3)
    number = made.cluster[1]
    means = torch.stack([a[number == k].mean(0) for k in range(4)])
    text = torch.stack([b[number == k].mean(0) for k in range(4)])
    torch.testing.assert_close(made.translated[0, 1], means)
    torch.testing.assert_close(made.centroids[1], text)
    target = (text[number] @ text.T / 0.3).softmax(1)
    expected = -(target * (made.scale * a @ means.T).log_softmax(1)).sum(1)
    torch.testing.assert_close(made.classified(a, number, 0, 1), expected)


def test_the_teachers_clusters_add_hard_targets(make_batch, features, unit):
    a, b = features
    words = unit(N, 3, seed=4)
    made = objective((a, b, words), prototypes=4, teacher_weight=2.0)
    without = objective((a, b), prototypes=4)
    number = made.cluster[2]
    extra = 0.0
    for x in (a, b):
        means = torch.stack([x[number == k].mean(0) for k in range(4)])
        extra = extra + F.cross_entropy(made.scale * x @ means.T, number, reduction="none")
    torch.testing.assert_close(
        losses(made, a, b, make_batch)["loss"], losses(without, a, b, make_batch)["loss"] + extra
    )


def test_items_without_a_partner_or_before_the_first_episode(make_batch, features):
    a, b = features
    made = ProtoCLIP(PAIR, prototypes=3, out_dim=D)
    made.heads = torch.nn.ModuleList([Same(), Same()])
    made.prepare(SimpleNamespace(source=SimpleNamespace(records=[None] * N)))
    out = losses(made, a, b, make_batch)
    assert not out["valid"].any() and out["loss"].sum() == 0 and out["loss"].requires_grad
    has_text = torch.arange(N) > 2
    made.form([(a, torch.ones(N, dtype=torch.bool)), (b, has_text)])
    assert made.cluster[1, :3].tolist() == [-1] * 3 and (made.cluster[0] >= 0).all()
    batch = make_batch({"image": a[:4], "text": b[3:4]}, items=torch.arange(4))
    batch.streams["text"].owner = torch.tensor([3])
    out = made(batch)
    assert out["valid"].tolist() == [False, False, False, True]
    both = losses(made, a[3:4], b[3:4], make_batch, torch.tensor([3]))["loss"]
    torch.testing.assert_close(out["loss"], torch.cat([torch.zeros(3), both]))
    with pytest.raises(UserError, match="cannot be put into 3 clusters"):
        made.form([(a, has_text), (b, torch.arange(N) < 2)])


@pytest.mark.parametrize(("options", "words"), [({"prototypes": 1}, "prototypes must be"), ({"every": 0}, "every")])
def test_bad_options(options, words):
    with pytest.raises(UserError, match=words):
        ProtoCLIP(PAIR, **options)


def test_a_run_and_its_resume(settings, tmp_path, monkeypatch):  # noqa: F811
    both = settings["phases"]["both"]
    both["sources"] = {"things": both["sources"]["things"] | {"sampler": "shuffle", "captions": "first"}}
    both |= {"trains": ["image.head", "text.head"], "train": {"max_steps": 10, "logging_steps": 1, "save_steps": 3}}
    both["objectives"] = [
        {"type": "infonce", "options": {"pair": PAIR}},
        {"type": "protoclip", "options": {"pair": PAIR, "prototypes": 4, "hidden": 16, "out_dim": 8, "warmup": 1}},
    ]
    settings |= {"phases": {"both": both}, "measures": {}}
    parsed = parse_config(copy.deepcopy(settings), AlignConfig)
    out = align(parsed, tmp_path / "run")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    proto = [r["protoclip:image:text"] for r in rows if "loss" in r]
    assert proto[:4] == [0.0] * 4 and all(p > 0 for p in proto[4:])  # four steps are the episode of warm-up

    class Killed(Exception):
        pass

    forward = ProtoCLIP.forward

    def dies(self, batch):
        if batch.step == 7:
            raise Killed
        return forward(self, batch)

    monkeypatch.setattr(ProtoCLIP, "forward", dies)
    with pytest.raises(Killed):
        align(parsed, tmp_path / "killed")
    monkeypatch.setattr(ProtoCLIP, "forward", forward)
    again = align(parsed, tmp_path / "killed", resume=True)
    heads = [(p / "final" / "heads.safetensors").read_bytes() for p in (out, again)]
    assert heads[0] == heads[1]
