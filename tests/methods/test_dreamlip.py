"""DreamLIP's oracles: the catalogue's entry 23."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from mmllm.align.objectives import InfoNCE
from mmllm.config import parse_config
from mmllm.errors import UserError
from mmllm.methods.dreamlip import DreamLIP, patches_in, slot_of, thresholded
from mmllm.train.align import AlignConfig, align
from tests.align.conftest import settings, world  # noqa: F401

PAIR = ["image", "text"]


@pytest.fixture
def several(make_batch, unit):
    """Three items with two texts each, item by item, and four patches."""
    tokens, texts = unit(3, 4, 8), unit(6, 8, seed=1)
    batch = make_batch({"image": (tokens, None), "text": texts}, items=torch.arange(3))
    batch.streams["text"].owner = torch.tensor([0, 0, 1, 1, 2, 2])
    return batch


def test_one_text_without_grouping_is_clip(make_batch, unit):
    batch = make_batch({"image": unit(5, 8), "text": unit(5, 8, seed=1)})
    torch.testing.assert_close(DreamLIP(PAIR, grouping=0)(batch)["loss"], InfoNCE(PAIR)(batch)["loss"])


def test_slots_are_the_mean_of_their_matrices(several, make_batch):
    image, text = several.streams["image"].embedding, several.streams["text"].embedding
    slots = [InfoNCE(PAIR)(make_batch({"image": image, "text": text[k::2]}))["loss"] for k in (0, 1)]
    torch.testing.assert_close(DreamLIP(PAIR, grouping=0)(several)["loss"], sum(slots) / 2)
    assert slot_of(torch.tensor([3, 1, 3, 3, 1])).tolist() == [0, 0, 1, 2, 1]


def test_known_weights():
    alike = torch.tensor([[0.1, 0.15, 0.9, 0.5]], requires_grad=True)
    weights = thresholded(alike, torch.ones(1, 4, dtype=torch.bool), 0.5)
    torch.testing.assert_close(weights, torch.tensor([[0.0, 0.0, 2 / 3, 1 / 3]]))
    for threshold in (None, 0.0, 0.9, 1.0):
        assert float(thresholded(alike, torch.ones(1, 4, dtype=torch.bool), threshold)[0, 2].detach()) > 0
    masked = thresholded(alike, torch.tensor([[True, True, False, True]]), 0.5)
    torch.testing.assert_close(masked, torch.tensor([[0.0, 0.0, 0.0, 1.0]]))
    flat = thresholded(torch.full((1, 4), 0.3), torch.tensor([[True, True, False, True]]), None)
    torch.testing.assert_close(flat, torch.tensor([[1 / 3, 1 / 3, 0.0, 1 / 3]]))


def test_dropped_patches_have_no_gradient_from_their_text(unit):
    text = F.normalize(torch.tensor([[1.0, 0.2, 0.1, 0.0]]), dim=-1)
    tokens = torch.stack([torch.eye(4)[[0, 1, 3]] + 0.01 * unit(3, 4)]).requires_grad_()
    objective = DreamLIP(PAIR, threshold=0.5)
    group = objective.grouped(text, tokens, torch.ones(1, 3, dtype=torch.bool))
    (group * unit(1, 4, seed=5)).sum().backward()
    moved = tokens.grad.abs().sum(-1)[0]
    # The lowest patch sets the scale's lower end, but in a weight of one patch alone that cancels.
    assert moved[0] > 0 and moved[1:].tolist() == pytest.approx([0, 0], abs=1e-6)


def test_grouping_written_out(several):
    objective = DreamLIP(PAIR, threshold=0.3)
    tokens, texts = several.streams["image"].token_embedding, several.streams["text"].embedding
    groups = []
    for b in range(3):
        for k in range(2):
            alike = tokens[b] @ texts[2 * b + k]
            scaled = (alike - alike.min()) / (alike.max() - alike.min())
            scaled = torch.where(scaled < 0.3, 0.0, scaled)
            groups.append(F.normalize((scaled[:, None] * tokens[b]).sum(0) / scaled.sum(), dim=0))
    logits = texts @ torch.stack(groups).T / 0.07
    expected = 0.5 * (F.cross_entropy(logits, torch.arange(6)) + F.cross_entropy(logits.T, torch.arange(6)))
    torch.testing.assert_close(objective(several)["groups"].detach(), expected)


@pytest.mark.parametrize("weights", ["minmax", "softmax"])
def test_order_of_patches_and_other_pictures_do_not_matter(several, weights):
    objective = DreamLIP(PAIR, weights=weights)
    before = objective(several)["loss"]
    stream = several.streams["image"]
    stream.token_embedding = stream.token_embedding[:, [2, 0, 3, 1]]
    torch.testing.assert_close(objective(several)["loss"], before)
    text, tokens = several.streams["text"], stream.token_embedding
    owner, full = text.owner, torch.ones(3, 4, dtype=torch.bool)
    groups = objective.grouped(text.embedding, tokens[owner], full[owner])
    changed = tokens.clone()
    changed[1] = changed[1].flip(-1)
    after = objective.grouped(text.embedding, changed[owner], full[owner])
    same = [torch.equal(x, y) for x, y in zip(groups, after)]
    assert same == [True, True, False, False, True, True]


def test_items_with_unequal_texts_or_none(several, make_batch):
    text, image = several.streams["text"], several.streams["image"]
    text.embedding, text.owner = text.embedding[[0, 1, 4]], torch.tensor([0, 0, 2])
    out = DreamLIP(PAIR, grouping=0)(several)
    assert out["valid"].tolist() == [True, False, True] and float(out["loss"][1]) == 0
    first = InfoNCE(PAIR)(make_batch({"image": image.embedding[[0, 2]], "text": text.embedding[[0, 2]]}))["loss"]
    torch.testing.assert_close(out["loss"][[0, 2]], first * torch.tensor([0.5, 1.0]))  # alone in its slot: loss 0
    text.embedding, text.owner = text.embedding[:0], text.owner[:0]
    none = DreamLIP(PAIR)(several)
    assert not none["valid"].any() and float(none["loss"].sum()) == 0


@pytest.mark.parametrize(("options", "words"), [({"weights": "x"}, "weights must"), ({"threshold": 2}, "threshold")])
def test_bad_options(options, words):
    with pytest.raises(UserError, match=words):
        DreamLIP(PAIR, **options)


def test_patches_of_a_box():
    assert patches_in([0.0, 0.5, 0.5, 1.0], 2, 4).tolist() == [False] * 4 + [True, True, False, False]


def test_a_run(settings, tmp_path):  # noqa: F811
    settings["streams"]["image"]["connector"] = {"type": "mlp", "hidden_dim": 16}
    source = {"data": "scenes_train.jsonl", "streams": PAIR, "captions": "all"}
    source["recipes"] = [{"type": "names_of_boxes", "separate": True}]
    settings["phases"] = {
        "both": {
            "sources": {"scenes": source},
            "objectives": [{"type": "dreamlip", "options": {"pair": PAIR}}],
            "trains": ["image.head", "image.connector", "text.head"],
            "train": {"max_steps": 30, "logging_steps": 10},
        }
    }
    settings["measures"] = {"objects": {"kind": "named_objects", "data": "scenes_val.jsonl", "streams": PAIR}}
    out = align(parse_config(settings | {"words": None}, AlignConfig), tmp_path / "run")
    found = {f["name"]: f for f in json.loads((out / "final" / "results.json").read_text())["figures"]}
    assert found["objects_located"]["chance"] == pytest.approx(0.25) and 0 <= found["objects_map"]["value"] <= 1
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [r for r in rows if "loss" in r]
    assert losses[-1]["groups"] < losses[0]["groups"] and losses[-1]["slots"] < losses[0]["slots"]
