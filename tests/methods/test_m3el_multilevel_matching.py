"""Oracles of multi-level matching: the catalogue's entry 44."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from mmllm.contracts import AlignBatch, Features, Stream
from mmllm.errors import UserError
from mmllm.methods.m3el_multilevel_matching import M3EL, CrossModal, IntraModal, many_temperatures
from mmllm.registry import make
from tests.align.conftest import settings, world  # noqa: F401
from tests.methods.short_run import short_run

PAIRS = [["image", "image@entity"], ["text", "text@entity"]]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def full(*shape):
    return torch.ones(*shape, dtype=torch.bool)


def rivals(count):
    return ~torch.eye(count, dtype=torch.bool)


def stream(seed, count=4, tokens=3):
    x = random(count, tokens, 6, seed=seed)
    return Stream(Features(x, full(count, tokens), x.mean(1)), F.normalize(random(count, 8, seed=seed + 50), dim=-1))


def batch(count=4, **about):
    names = [s for p in PAIRS for s in p]
    return AlignBatch({n: stream(k, count) for k, n in enumerate(names)}, ids=[str(i) for i in range(count)], **about)


def objective(**options):
    torch.manual_seed(0)
    made = M3EL(PAIRS, width=5, **options)
    made.setup(SimpleNamespace(tower=lambda _: SimpleNamespace(pooled_size=6, hidden_size=6)))
    return made


def test_equal_vectors_have_the_closed_form():
    same = F.normalize(random(1, 8), dim=-1).expand(6, 8)
    value = M3EL(PAIRS, matching=False).intra_contrast(same, same, rivals(6))
    torch.testing.assert_close(value, torch.full((6,), math.log(6 + 5 * math.exp((0.8 - 1) / 0.03))))


def test_negatives_of_the_own_side_only_add():
    a, b = (F.normalize(random(5, 8, seed=s), dim=-1) for s in (0, 1))
    with_own = M3EL(PAIRS, temperature=0.3).intra_contrast(a, b, rivals(5))
    plain = M3EL(PAIRS, temperature=0.3, within=None).intra_contrast(a, b, rivals(5))
    torch.testing.assert_close(plain, F.cross_entropy(a @ b.T / 0.3, torch.arange(5), reduction="none"))
    assert (with_own > plain).all()
    denominator = (a @ b.T / 0.3).exp().sum(1) + ((0.8 * a @ a.T / 0.3).exp() * rivals(5)).sum(1)
    torch.testing.assert_close(with_own, denominator.log() - (a * b).sum(1) / 0.3)


def test_one_thing_to_find_is_found_by_all():
    torch.manual_seed(0)
    crossing = CrossModal(6)
    found = crossing.find(random(2, 4, 6), random(2, 1, 6, seed=1))
    torch.testing.assert_close(found, found[:, :1].expand_as(found))


def test_the_order_of_the_parts_does_not_matter():
    torch.manual_seed(0)
    level = IntraModal(6, 6, 5)
    mention, entity = (level.project(random(3, 6, seed=s), random(3, 4, 6, seed=s + 2), full(3, 4)) for s in (0, 1))
    value = level.global_to_local(mention, entity)
    turned = (mention[0], mention[1][:, [2, 0, 3, 1]], mention[2])
    torch.testing.assert_close(level.global_to_local(turned, entity), value)
    q, k, v = level.query(entity[1][2]), level.key(mention[1][1]), level.value(mention[1][1])
    context = level.norm(((q @ k.T / 5**0.5).softmax(-1) @ v).mean(0))
    torch.testing.assert_close(value[1, 2], context @ level.asks(entity[0][2]))
    padded = (mention[0], F.pad(mention[1], (0, 0, 0, 2), value=9.0), F.pad(mention[2], (0, 2)))
    torch.testing.assert_close(level.global_to_local(padded, entity), value)


def test_pooling_at_many_temperatures():
    x, mask = random(2, 4, 3), torch.tensor([[True] * 4, [True, True, False, False]])
    expected = [x[0].amax(0)] + [((t * x[0]).softmax(0) * x[0]).sum(0) for t in (2, 2.5, 3.5, 4.5)]
    pooled = many_temperatures(x, mask)
    torch.testing.assert_close(pooled[0], x[0].mean(0) + torch.stack(expected).mean(0))
    torch.testing.assert_close(pooled[1], many_temperatures(x[1:, :2], mask[1:, :2])[0])
    same = torch.ones(1, 4, 3)
    torch.testing.assert_close(many_temperatures(same, full(1, 4)), torch.full((1, 3), 2.0))


def test_the_loss_is_the_sum_of_its_parts():
    whole = objective()(batch())
    rows = {s: torch.arange(4) for p in PAIRS for s in p}
    scores = objective().scores(batch(), rows)
    assert len(scores) == 4 and len(objective(both=True).scores(batch(), rows)) == 5
    torch.testing.assert_close(scores[0], torch.stack(scores[1:]).mean(0))
    links = sum(F.cross_entropy(s, torch.arange(4), reduction="none") for s in scores)
    torch.testing.assert_close(whole["loss"] - objective(matching=False)(batch())["loss"], links)


def test_items_of_one_label_are_no_rivals_and_some_items_lack_a_side():
    same = objective()(batch(label_ids=torch.tensor([1, 1, 2, 3])))["loss"]
    apart = objective(same_label=False)(batch(label_ids=torch.tensor([1, 1, 2, 3])))["loss"]
    assert (same[:2] < apart[:2]).all()
    torch.testing.assert_close(same[2:], apart[2:])
    lacking = batch()
    lacking.streams["text"] = stream(2, 3)
    lacking.streams["text"].owner = torch.tensor([0, 2, 3])
    out = objective()(lacking)
    assert out["valid"].tolist() == [True, False, True, True]
    assert out["loss"][1] == 0 and (out["loss"][[0, 2]] > 0).all()
    out["loss"].sum().backward()


def test_mentions_get_their_entitys_picture():
    records = [{"id": str(i), "image": f"{i}.png", "label": n} for i, n in enumerate("abacab")]
    found = list(make("data_recipe", "mention_entity").apply(iter(records)))
    assert [(r["id"], r["video"]) for r in found] == [("2", ["0.png"]), ("4", ["0.png"]), ("5", ["1.png"])]


def test_mistakes_are_named():
    with pytest.raises(UserError, match="one or two pairs"):
        M3EL(["image", "text"])
    with pytest.raises(UserError, match="above 0"):
        M3EL(PAIRS, temperature=0)


def test_the_card_switches_it_on(settings, tmp_path):  # noqa: F811
    settings["streams"] |= {"image@entity": {"of": "image"}, "text@entity": {"of": "text", "captions": "first"}}
    line = [{"type": "m3el", "options": {"pairs": PAIRS, "width": 8}}]
    rows = short_run(settings, tmp_path / "run", line, ["image.head", "text.head"])
    assert [r["m3el"] > 0 for r in rows if "loss" in r] == [True] * 3
