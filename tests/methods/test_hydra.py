"""Hydra's oracles: the catalogue's entry 38."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from mmllm.errors import UserError
from mmllm.methods.hydra import Hydra, gated_cosine, pair_loss
from tests.align.conftest import settings, world  # noqa: F401
from tests.methods.short_run import short_run

PAIR = ["image", "text"]


def made(**options):
    torch.manual_seed(0)
    objective = Hydra(PAIR, width=6, hidden=12, classes=8, **options)
    objective.setup(SimpleNamespace(embedding_dim=8))  # type: ignore[arg-type]
    return objective


def test_an_open_gate_on_unique_classes_is_infonce_one_way(make_batch, unit):
    a, b = unit(5, 8), unit(5, 8, seed=1)
    batch = make_batch({"image": a, "text": b}, label_ids=torch.arange(5) + 100)
    out = made(partner="identical", gate="open")(batch)
    torch.testing.assert_close(out["loss"], F.cross_entropy(10 * a @ b.T, torch.arange(5), reduction="none"))
    assert out["valid"].all()
    both = made(partner="identical", gate="open", symmetric=True)(batch)["loss"]
    other = F.cross_entropy(10 * b @ a.T, torch.arange(5), reduction="none")
    torch.testing.assert_close(both, (out["loss"] + other) / 2)


def test_the_gates_length_cancels_and_one_feature_leaves_a_sign(unit):
    a, b, gate = unit(4, 8), unit(6, 8, seed=1), torch.rand(4, 8, generator=torch.Generator().manual_seed(0))
    alike = gated_cosine(a, b, gate)
    torch.testing.assert_close(gated_cosine(a, b, 0.3 * gate), alike)
    expected = torch.stack([F.cosine_similarity(a[i] * gate[i], b * gate[i]) for i in range(4)])
    torch.testing.assert_close(alike, expected)
    one = F.one_hot(torch.tensor([0, 3, 3, 7]), 8).float()
    torch.testing.assert_close(gated_cosine(a, b, one).abs(), torch.ones(4, 6))


@pytest.mark.parametrize("kind", ["mean", "product"])
def test_a_gate_belongs_to_two_classes_in_either_order(kind):
    objective = made(gate=kind).eval()
    first, second = torch.tensor([0, 1, 2]), torch.tensor([3, 1, 0])
    gate = objective.gates(first, second, 8)
    torch.testing.assert_close(gate, objective.gates(second, first, 8))
    assert gate.shape == (3, 8) and ((gate > 0) & (gate < 1)).all() and not torch.allclose(gate[0], gate[1])


def test_items_of_the_own_class_are_neither(unit):
    own, partner, theirs = torch.tensor([0, 0]), torch.tensor([1, 1]), torch.tensor([0, 0, 1, 1, 2])
    logits = torch.randn(2, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = pair_loss(logits, own, partner, theirs)
    expected = torch.stack([torch.logaddexp(logits[:, p], logits[:, 4]) - logits[:, p] for p in (2, 3)]).mean(0)
    torch.testing.assert_close(loss, expected)
    loss.sum().backward()
    assert logits.grad is not None and (logits.grad[:, :2] == 0).all() and (logits.grad[:, 2:] != 0).all()
    alone = pair_loss(torch.zeros(1, 1, requires_grad=True), own[:1], partner[:1], theirs[2:3])
    alone.sum().backward()
    assert float(alone.detach()) == 0


def test_partners_follow_the_step_and_their_rule():
    classes, all_items = torch.tensor([0, 0, 1, 1, 2]), torch.arange(5)
    shuffled, _ = made().partners(classes, all_items, 3)
    assert shuffled.sort().values.tolist() == classes.tolist()
    assert torch.equal(shuffled, made().partners(classes, all_items, 3)[0])
    assert any(not torch.equal(shuffled, made().partners(classes, all_items, s)[0]) for s in range(4))
    distinct = made(partner="distinct")
    assert all((distinct.partners(classes, all_items, s)[0] != classes).all() for s in range(5))
    partner, has = distinct.partners(classes, torch.tensor([0, 1]), 0)  # only class 0 has columns
    assert has.tolist() == [False, False, True, True, True] and (partner == 0).all()


def test_items_without_a_row_or_partner_have_no_loss(make_batch, unit):
    a, b = unit(3, 8), unit(4, 8, seed=1)
    batch = make_batch({"image": a, "text": b}, label_ids=torch.tensor([5, 6, 7, 5]))
    batch.streams["image"].owner = torch.tensor([0, 1, 1])
    out = made(partner="identical", gate="open")(batch)
    assert out["valid"].tolist() == [True, True, False, False]
    classes, own = torch.tensor([0, 1, 2, 0]), torch.tensor([0, 1, 1])
    rows = pair_loss(10 * a @ b.T, classes[own], classes[own], classes)
    torch.testing.assert_close(out["loss"][:2], torch.stack([rows[0], rows[1:].mean()]))


def test_classes_are_numbered_as_they_are_met():
    objective = made()
    assert objective.numbers(torch.tensor([90, 70, 90])).tolist() == [1, 0, 1]
    assert objective.numbers(torch.tensor([10, 70])).tolist() == [2, 0]
    with pytest.raises(UserError, match="more than 8 classes"):
        objective.numbers(torch.arange(100, 109))
    for options, words in (({"gate": "opne"}, "open"), ({"partner": "x"}, "partner"), ({"temperature": 0}, "above 0")):
        with pytest.raises(UserError, match=words):
            Hydra(PAIR, **options)


def test_the_card_switches_it_on(settings, tmp_path):  # noqa: F811
    settings["streams"]["image@view"] = {"of": "image"}
    options = {"pair": ["image", "image@view"], "partner": "distinct"}
    sampler = {"type": "k_per_group", "options": {"k": 2}}
    line = [{"type": "hydra", "options": options}]
    rows = short_run(settings, tmp_path / "run", line, ["image.head"], streams=["image"], sampler=sampler)
    assert [r["hydra:image:image@view"] > 0 for r in rows if "loss" in r] == [True] * 3
