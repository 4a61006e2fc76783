"""Oracles of common and salient patterns: the catalogue's entry 57."""

from __future__ import annotations

import io
import json
import math

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from mmllm.contracts import AlignBatch, Stream
from mmllm.errors import UserError
from mmllm.methods.sepclr import SepCLR, joint_entropy, uniformity
from mmllm.registry import make
from tests.align.conftest import settings, world  # noqa: F401
from tests.methods.short_run import short_run


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_joint_entropy_of_equal_and_of_far_points():
    c, none = F.normalize(random(6, 4), dim=-1), torch.zeros(6, 3, dtype=torch.float64)
    kernel = (-torch.cdist(c, c).square()).exp()
    torch.testing.assert_close(joint_entropy(c, none), kernel.mean(1).log().mean())
    zero = torch.tensor(0.0, dtype=torch.float64)
    torch.testing.assert_close(joint_entropy(c[:1].expand(6, 4), none), zero)
    torch.testing.assert_close(joint_entropy(c, 100 * random(6, 3)), zero - math.log(6))


def test_salient_vectors_of_zero_get_no_gradient_from_the_joint_entropy():
    s = torch.zeros(6, 3, dtype=torch.float64, requires_grad=True)
    joint_entropy(F.normalize(random(6, 4), dim=-1), s).backward()
    assert s.grad is not None and (s.grad == 0).all()


def test_salient_vectors_that_follow_the_common_ones_have_less_joint_entropy():
    c = F.normalize(random(200, 4), dim=-1)
    assert joint_entropy(c, c.roll(1, 0)) < joint_entropy(c, c) - 0.05


def test_uniformity_over_pairs():
    x = random(5, 3)
    pairs = torch.pdist(x).square()
    torch.testing.assert_close(uniformity(x), 0.5 * (-pairs).exp().mean().log())
    torch.testing.assert_close(uniformity(x, 2.0), 0.5 * (-pairs / 4).exp().mean().log())
    assert float(uniformity(x[:1])) == 0


def batch(target, seed=0):
    streams = {}
    for k, name in enumerate(("image", "image@view")):
        tokens = random(len(target), 2, 3, seed=seed + k).float()
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool)
        streams[name] = Stream(
            embedding=F.normalize(random(len(target), 4, seed=9 + k).float(), dim=-1),
            token_embedding=tokens,
            token_mask=mask,
        )
    meta = [{"overlaid": t} for t in target]
    return AlignBatch(streams, ids=[str(i) for i in range(len(target))], extras={"meta": meta})


def test_the_loss_is_its_weighted_terms():
    one = batch([True, False, True, False, True])
    out = SepCLR("image", salient=3, background=5, jem=7)(one)
    c, s = [[one.streams[n].embedding, one.streams[n].token_embedding.mean(1)] for n in one.streams][:2]
    target = torch.tensor([True, False, True, False, True])
    common = (c[0] - s[0]).square().sum(1).mean() + uniformity(c[0]) + uniformity(s[0])
    torch.testing.assert_close(out["common"], common)
    kept = [x[1] * target[:, None] for x in (c, s)]
    salient = (c[1] - s[1])[target].square().sum(1).mean() + uniformity(kept[0]) + uniformity(kept[1])
    torch.testing.assert_close(out["salient"], salient)
    zero = torch.stack([x[1][~target].square().sum(1).mean() for x in (c, s)]).mean()
    torch.testing.assert_close(out["background"], zero)
    joint = (joint_entropy(c[0], kept[0]) + joint_entropy(s[0], kept[1])) / 2
    torch.testing.assert_close(out["joint"], joint)
    torch.testing.assert_close(out["loss"], common + 3 * salient + 5 * zero + 7 * joint)


def test_what_background_holds_counts_only_as_its_length():
    target = [True, True, False]
    one, other = batch(target), batch(target)
    for name in one.streams:
        other.streams[name].token_embedding[2] *= -2
    a, b = SepCLR("image")(one), SepCLR("image")(other)
    for name in ("common", "salient", "joint"):
        torch.testing.assert_close(a[name], b[name])
    torch.testing.assert_close(b["background"], 4 * a["background"])
    assert torch.isfinite(SepCLR("image")(batch([False] * 3))["loss"])
    with pytest.raises(UserError, match=r"no meta\.other"):
        SepCLR("image", target="other")(one)


def test_overlays_are_pasted_on_the_target_half(world):  # noqa: F811
    records = [json.loads(x) for x in (world / "things_train.jsonl").read_text().splitlines()]
    records = [{**r, "image": str(world / r["image"])} for r in records]
    spec = {"type": "overlay", "things": 2, "side": 32, "size": 0.5}
    found = list(make("data_recipe", spec).apply(iter(records)))
    pasted = {"black bar", "black square"}
    assert not pasted & {r["meta"]["under"] for r in found} and len(found) == 24
    plain = list(make("data_recipe", {**spec, "share": 0.0}).apply(iter(records)))
    for with_thing, without in zip(found, plain):
        assert (with_thing["image"] != without["image"]) == with_thing["meta"]["overlaid"]
        assert with_thing["meta"].get("overlay") in (pasted if with_thing["meta"]["overlaid"] else {None})
        assert Image.open(io.BytesIO(with_thing["image"])).size == (32, 32)
    assert 0 < sum(r["meta"]["overlaid"] for r in found) < 24
    chosen = list(make("data_recipe", {**spec, "things": ["red bar", "unknown"], "share": 1.0}).apply(iter(records)))
    assert {r["meta"]["overlay"] for r in chosen} == {"red bar"} and len(chosen) == 28
    with pytest.raises(UserError, match="no pictures are left"):
        list(make("data_recipe", {**spec, "things": 8}).apply(iter(records)))


def test_the_card_switches_it_on(settings, tmp_path):  # noqa: F811
    settings["streams"]["image"]["connector"] = {"type": "mlp", "hidden_dim": 16}
    recipes = [{"type": "overlay", "things": 2, "side": 64}]
    source = {"streams": ["image"], "recipes": recipes, "augment": "scene", "copies": 1, "sampler": "random"}
    line = [{"type": "sepclr", "options": {"stream": "image", "target": "overlaid"}}]
    rows = short_run(settings, tmp_path / "run", line, ["image.head", "image.connector"], **source)
    assert [math.isfinite(r["salient"]) and r["background"] >= 0 for r in rows if "loss" in r] == [True] * 3
