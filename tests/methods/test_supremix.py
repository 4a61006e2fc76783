"""SupReMix's oracles: the catalogue's entry 60."""

from __future__ import annotations

import json
import math

import pytest
import torch

from mmllm.config import parse_config
from mmllm.errors import UserError
from mmllm.methods.supremix import SupReMix, ridge, weighted_supcon
from mmllm.train.align import AlignConfig, align
from tests.align.conftest import settings, world  # noqa: F401


def make(**options):
    return SupReMix(["image", "text"], "size", **options)


def half(n):
    return torch.full((n, n), 0.5)


def test_without_mixtures_and_weights_it_is_supcon_up_to_the_mean(unit):
    z, y = unit(8, 6), torch.tensor([0.0, 0, 1, 1, 1, 2, 2, 3])
    loss = make(mix_negatives=False, mix_positives=False, magnify=False).loss(z, y, half(8))
    for i in range(8):
        logits = z[i] @ z.T / 0.3
        others = [a for a in range(8) if a != i]
        found = [logits[others].logsumexp(0) - logits[p] for p in others if y[p] == y[i]]
        torch.testing.assert_close(loss[i], sum(found, torch.tensor(0.0)) / (len(found) + 1))


def test_weights_of_two_add_a_share_of_log_two(unit):
    logits, allow = 3 * unit(5, 7), torch.ones(5, 7, dtype=torch.bool)
    positive = torch.arange(7)[None] < torch.arange(1, 6)[:, None]
    plain = weighted_supcon(logits, positive, torch.zeros(5, 7), allow)
    double = weighted_supcon(logits, positive, torch.full((5, 7), math.log(2)), allow)
    share = torch.arange(1, 6) / torch.arange(2, 7)
    torch.testing.assert_close(double - plain, math.log(2) * share)


def test_magnifying_weighs_by_distance_plus_one(unit):
    z, y = unit(4, 6), torch.tensor([0.0, 0, 3, 7])
    loss = make(mix_negatives=False, mix_positives=False).loss(z, y, half(4))
    terms = (z[0] @ z.T / 0.3).exp()
    expected = 0.5 * ((terms[1] + 4 * terms[2] + 8 * terms[3]).log() - z[0] @ z[1] / 0.3)
    torch.testing.assert_close(loss[0], expected)


def test_a_mixed_positive_has_the_anchors_label():
    y = torch.tensor([4.0, 1, 2, 5, 6, 20])
    chosen, share = make(gap=5).mixed_positives(y)
    assert chosen[0].nonzero().tolist() == [[j, k] for j in (1, 2) for k in (3, 4)]
    i, j, k = chosen.nonzero().T
    lam = share[chosen]
    torch.testing.assert_close(lam * y[j] + (1 - lam) * y[k], y[i])
    assert ((lam > 0) & (lam < 1)).all()
    torch.testing.assert_close(share[0, 2, 4], torch.tensor(0.5))  # 2 and 6 lie equally far from 4
    assert not chosen[5].any()  # all others are more than 5 below 20


def test_the_whole_loss_written_out(unit):
    z, y, share = unit(3, 6), torch.tensor([2.0, 1, 4]), torch.rand(3, 3, generator=torch.Generator().manual_seed(0))
    terms, logs = [], []
    for k in (1, 2):
        terms.append((z[0] @ z[k] / 0.3, abs(float(y[0] - y[k])) + 1))
        mixed, label = share[0, k] * z[0] + (1 - share[0, k]) * z[k], share[0, k] * y[0] + (1 - share[0, k]) * y[k]
        terms.append((z[0] @ mixed / 0.3, abs(float(y[0] - label)) + 1))
    lam = 2 / 3  # of 1 and 4 that makes 2
    hit = z[0] @ (lam * z[1] + (1 - lam) * z[2]) / 0.3
    logs = torch.stack([s + math.log(w) for s, w in [*terms, (hit, 1.0)]])
    torch.testing.assert_close(make().loss(z, y, share)[0], (logs.logsumexp(0) - hit) / 2)


def test_mixtures_give_their_sources_no_gradient(unit):
    z, y = unit(3, 6).requires_grad_(), torch.tensor([2.0, 1, 4])
    with_mixtures = make(magnify=False).loss(z, y, half(3))[0]
    # Only the three real pairs' part of the denominator may reach rows 1 and 2, along row 0.
    (grad,) = torch.autograd.grad(with_mixtures, z)
    across = grad[1:] - (grad[1:] @ z[0])[:, None] * z[0]
    torch.testing.assert_close(across, torch.zeros(2, 6), atol=1e-6, rtol=0)
    hit, logits = (2 * z[1] + z[2]) @ z[0] / 0.9, z[1:] @ z[0] / 0.3
    mixed = (0.5 * z[0] + 0.5 * z[1:]) @ z[0] / 0.3
    total = torch.cat([logits, mixed, hit[None]]).logsumexp(0)
    for k in (0, 1):
        torch.testing.assert_close(grad[k + 1], 0.5 * (logits[k] - total).exp() * z[0] / 0.3)


def test_rows_without_a_number_take_no_part(make_batch, unit):
    rows = {"image": unit(4, 6), "text": unit(4, 6, seed=1)}
    meta = [{"size": 1}, {}, {"size": 2}, {"size": 1}]
    out = make()(make_batch(rows, extras={"meta": meta}))
    assert out["valid"].tolist() == [True, False, True, True]
    keep = [0, 2, 3]
    less = make_batch({k: v[keep] for k, v in rows.items()}, extras={"meta": [meta[i] for i in keep]})
    for how in ({"mix_negatives": False},):  # the draws of negatives go by place
        full = make(**how)(make_batch(rows, extras={"meta": meta}))["loss"]
        torch.testing.assert_close(full[keep], make(**how)(less)["loss"])
    with pytest.raises(UserError, match=r"meta\.size must be a number"):
        make()(make_batch(rows, extras={"meta": [{"size": "big"}] * 4}))


def test_mistakes_are_named():
    with pytest.raises(UserError, match="temperature must be above 0"):
        make(temperature=0)
    with pytest.raises(UserError, match="two numbers"):
        make(concentration=[1])


def test_ridge_without_penalty_is_least_squares():
    x = torch.randn(20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = x @ torch.tensor([1.0, -2, 3], dtype=torch.float64) + 5
    torch.testing.assert_close(ridge(x, y, 0.0, x), y)


def test_a_run_by_the_cards_line(settings, world, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("MMLLM_CACHE", str(tmp_path / "cache"))
    for split in ("train", "val"):
        lines = (world / f"scenes_{split}.jsonl").read_text().splitlines()
        records = [{**json.loads(x), "boxes": json.loads(x)["boxes"][: 1 + n % 2]} for n, x in enumerate(lines)]
        (world / f"counted_{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    recipes = [{"type": "box_number", "what": "count", "field": "size"}]
    source = {"data": "counted_train.jsonl", "recipes": recipes, "streams": ["image"]}
    settings["phases"] = {
        "one": {
            "sources": {"scenes": source},
            "objectives": [{"type": "supremix", "options": {"streams": ["image"], "label": "size"}}],
            "trains": ["image.tower", "image.head"],
            "train": {"max_steps": 3},
        }
    }
    settings["measures"] = {
        "size": {
            "kind": "ordinal", "data": "counted_val.jsonl", "train": "counted_train.jsonl", "recipes": recipes,
            "streams": ["image"], "field": "size",
        }
    }  # fmt: skip
    align(parse_config(settings, AlignConfig), tmp_path / "run")
    figures = {f["name"]: f for f in json.loads(next(tmp_path.rglob("results.json")).read_text())["figures"]}
    assert 0 < figures["size_error"]["value"] < 2 and figures["size_error"]["chance"] == 0.5
    assert -1 <= figures["size_order"]["value"] <= 1
