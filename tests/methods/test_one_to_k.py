"""1-to-K's oracles: the catalogue's entry 9."""

from __future__ import annotations

import json
import math

import pytest
import torch

from mmllm.align.objectives import InfoNCE
from mmllm.config import parse_config
from mmllm.methods.one_to_k import OneToK, rank_variance, ranks_of
from mmllm.train.align import align
from mmllm.train.align_config import AlignConfig
from tests.align.conftest import settings, world  # noqa: F401

PAIR = ["image", "text"]


def loss(image, text, k, make_batch, scale=10.0, owner=None, **options):
    batch = make_batch({"image": image, "text": text}, scale, ids=[str(i) for i in range(len(image))])
    batch.streams["text"].owner = torch.arange(len(image)).repeat_interleave(k) if owner is None else owner
    return OneToK(PAIR, **options)(batch)["loss"]


def test_one_text_each_is_infonce(make_batch, unit):
    image, text = unit(5, 8), unit(5, 8, seed=1)
    expected = InfoNCE(PAIR)(make_batch({"image": image, "text": text}))["loss"]
    torch.testing.assert_close(loss(image, text, 1, make_batch), expected)


@pytest.mark.parametrize("divided", [False, True])
def test_equals_the_formula(divided, make_batch, unit):
    b, k = 4, 3
    image, text = unit(b, 8), unit(b * k, 8, seed=1)
    logits = 10 * image @ text.T
    forth = logits.log_softmax(1)
    i2t = -torch.stack([forth[i, i * k : (i + 1) * k].mean() for i in range(b)]).mean()
    t2i = torch.nn.functional.cross_entropy(logits.T, torch.arange(b).repeat_interleave(k))
    expected = (i2t + t2i) / 2 / (k if divided else 1)
    torch.testing.assert_close(loss(image, text, k, make_batch, divided=divided).mean(), expected)


def test_least_value_is_half_of_log_k(make_batch):
    image = torch.eye(5)
    found = loss(image, image.repeat_interleave(3, 0), 3, make_batch, scale=100.0)
    torch.testing.assert_close(found, torch.full((5,), 0.5 * math.log(3)))


def test_order_of_the_languages_changes_nothing(make_batch, unit):
    image, text = unit(4, 8), unit(12, 8, seed=1)
    turned = text.view(4, 3, 8)[:, [2, 0, 1]].reshape(12, 8)
    torch.testing.assert_close(loss(image, turned, 3, make_batch), loss(image, text, 3, make_batch))


def test_items_with_fewer_languages(make_batch, unit):
    image, text, owner = unit(3, 8), unit(5, 8, seed=1), torch.tensor([0, 0, 0, 1, 2])
    logits = 10 * image @ text.T
    rows = -torch.stack([logits.log_softmax(1)[i, owner == i].mean() for i in range(3)])
    cols = -logits.T.log_softmax(1)[torch.arange(5), owner]
    expected = 0.5 * (rows + torch.stack([cols[owner == i].mean() for i in range(3)]))
    torch.testing.assert_close(loss(image, text, 0, make_batch, owner=owner), expected)


def test_rank_variance():
    assert rank_variance(torch.tensor([[1, 5]])) == (4.0, 2.0)
    assert rank_variance(torch.tensor([[3, 3, 3], [7, 7, 7]])) == (0.0, 0.0)
    ranks = torch.tensor([[1, 5, 2], [0, 0, 9]])
    assert rank_variance(ranks) == pytest.approx(rank_variance(ranks + 4)) and rank_variance(ranks)[0] > 0


def test_ranks_among_other_labels():
    sim = torch.tensor([[0.9, 0.5, 0.7], [0.8, 0.1, 0.2], [0.3, 0.3, 0.2]])
    assert ranks_of(sim, ["a", "b", "c"]).tolist() == [0, 2, 2]
    assert ranks_of(sim, ["a", "b", "b"]).tolist() == [0, 1, 1]


def test_a_run_in_three_languages(settings, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("MMLLM_CACHE", str(tmp_path / "cache"))
    recipe = {"type": "made_up_languages", "count": 3}
    both = settings["phases"]["both"]
    both["sources"] = {"things": both["sources"]["things"] | {"recipes": [recipe], "captions": "all"}}
    both |= {"objectives": [{"type": "one_to_k", "options": {"pair": PAIR}}], "trains": ["image.head", "text.head"]}
    both["train"] = {"max_steps": 3, "logging_steps": 1}
    settings["phases"] = {"both": both}
    about = {"data": "things_val.jsonl", "streams": PAIR, "recipes": [recipe]}
    settings["measures"] = {"said": {"kind": "mean_rank_variance", **about}}
    out = align(parse_config(settings, AlignConfig), tmp_path / "run")
    figures = {f["name"]: f["value"] for f in json.loads((out / "final" / "results.json").read_text())["figures"]}
    assert figures["said_to_item_variance"] >= 0 and 0 <= figures["said_r1"] <= 1
    assert figures["said_variance"] == (figures["said_to_item_variance"] + figures["said_to_text_variance"]) / 2
