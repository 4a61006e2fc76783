"""The contrastive gap's oracles: the catalogue's entry 17."""

from __future__ import annotations

import json

import pytest
import torch

from mmllm.align.objectives import InfoNCE
from mmllm.config import parse_config
from mmllm.errors import UserError
from mmllm.evaluate.geometry import alignment
from mmllm.evaluate.geometry import uniformity as measured
from mmllm.methods.contrastive_gap import ContrastiveGap, linearly_separated, uniformity
from mmllm.train.align import AlignConfig, align
from tests.align.conftest import settings, world  # noqa: F401

PAIR = ["image", "text"]


def pairs(n):
    return ~torch.eye(n, dtype=torch.bool)


def test_uniformity_of_known_points(unit):
    same = unit(1, 8).expand(5, 8)
    torch.testing.assert_close(uniformity(same, same, pairs(5)), torch.tensor(0.0), atol=1e-6, rtol=0)
    torch.testing.assert_close(uniformity(torch.eye(6), torch.eye(6), pairs(6)), torch.tensor(-4.0))
    poles = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    torch.testing.assert_close(uniformity(poles, poles, pairs(2)), torch.tensor(-8.0))
    x = unit(7, 8)
    assert float(uniformity(x, x, pairs(7))) == pytest.approx(measured(x), abs=1e-5)


def test_terms_are_those_written_out(make_batch, unit):
    a, b = unit(5, 8), unit(5, 8, seed=1)
    terms = ContrastiveGap(PAIR).terms(make_batch({"image": a, "text": b}))
    assert float(terms["uniformity"]) == pytest.approx((measured(a) + measured(b)) / 2, abs=1e-5)
    assert float(terms["alignment"]) == pytest.approx(float((2 - 2 * (a * b).sum(1)).mean()), abs=1e-5)
    assert float(terms["alignment"]) == pytest.approx(alignment(a, b), abs=1e-5)
    crossed = [torch.exp(-2 * (a[j] - b[k]).square().sum()) for j in range(5) for k in range(5) if j != k]
    torch.testing.assert_close(terms["cross_uniformity"], torch.stack(crossed).mean().log())


def test_loss_is_the_weighted_sum(make_batch, unit):
    batch = make_batch({"image": unit(5, 8), "text": unit(5, 8, seed=1)})
    terms = ContrastiveGap(PAIR).terms(batch)
    infonce = InfoNCE(PAIR)(batch)["loss"].mean()
    torch.testing.assert_close(ContrastiveGap(PAIR)(batch)["loss"], infonce + terms["uniformity"] + terms["alignment"])
    alone = ContrastiveGap(PAIR, contrast=0, uniformity=0, alignment=0, cross_uniformity=2)(batch)["loss"]
    torch.testing.assert_close(alone, 2 * terms["cross_uniformity"])
    bare = {"uniformity": 0, "alignment": 0, "temperature": 0.1}  # the fixture's learned scale is 10, too
    torch.testing.assert_close(ContrastiveGap(PAIR, **bare)(batch)["loss"], infonce)


def test_a_common_rotation_changes_nothing(make_batch, unit):
    a, b = unit(5, 8), unit(5, 8, seed=1)
    turn = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(2)))[0]
    turned = make_batch({"image": a @ turn, "text": b @ turn})
    one, two = (ContrastiveGap(PAIR).terms(x) for x in (make_batch({"image": a, "text": b}), turned))
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-5, rtol=1e-5)


def test_equal_streams_have_no_gap(make_batch, unit):
    a = unit(200, 8)
    assert float(ContrastiveGap(PAIR).terms(make_batch({"image": a, "text": a}))["alignment"]) < 1e-5
    assert abs(float(linearly_separated(a, a).double().mean()) - 0.5) < 0.1
    assert bool(linearly_separated(a, -a[:, :1] * 0 + torch.eye(8)[0].expand_as(a) * 9).all())


def test_missing_rows_and_equal_labels_leave_pairs_out(make_batch, unit):
    a, b = unit(4, 8), unit(4, 8, seed=1)
    batch = make_batch({"image": a, "text": b}, labels=["x", "x", "y", "z"])
    kept = torch.tensor([[i != j and {i, j} != {0, 1} for j in range(4)] for i in range(4)])
    torch.testing.assert_close(ContrastiveGap(PAIR).terms(batch)["cross_uniformity"], uniformity(a, b, kept))
    ragged = make_batch({"image": a, "text": b[:2]}, items=torch.arange(4))
    ragged.streams["text"].owner = torch.tensor([1, 3])
    terms = ContrastiveGap(PAIR).terms(ragged)
    torch.testing.assert_close(terms["alignment"], (2 - 2 * (a[[1, 3]] * b[:2]).sum(1)).mean())
    none = make_batch({"image": a, "text": b[:0]}, items=torch.arange(4))
    none.streams["text"].owner = torch.zeros(0, dtype=torch.long)
    assert torch.isfinite(ContrastiveGap(PAIR)(none)["loss"])


def test_a_bad_temperature_is_refused():
    with pytest.raises(UserError, match="temperature must be above 0"):
        ContrastiveGap(PAIR, temperature=0)


def test_a_run_closes_the_gap(settings, tmp_path):  # noqa: F811
    both = settings["phases"]["both"]
    both |= {"sources": {"things": both["sources"]["things"]}, "trains": ["image.head", "text.head"]}
    both["train"] = {"max_steps": 40, "logging_steps": 40}
    same = {"data": "things_val.jsonl", "streams": PAIR}
    settings |= {"phases": {"both": both}, "measures": {"g": {"kind": "geometry", **same}}}
    settings["measures"]["s"] = {"kind": "separability", **same}
    gaps = {}
    for name, options in (("infonce", {"uniformity": 0, "alignment": 0}), ("cua", {})):
        both["objectives"] = [{"type": "contrastive_gap", "options": {"pair": PAIR, "temperature": 0.05, **options}}]
        out = align(parse_config(settings, AlignConfig), tmp_path / name)
        found = {f["name"]: f["value"] for f in json.loads((out / "final" / "results.json").read_text())["figures"]}
        gaps[name] = found["g_image_text_gap"]
        assert 0 <= found["s_image_text_separability"] <= 1
    assert gaps["cua"] < gaps["infonce"]
