"""Objectives against closed forms and independent references."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from mmllm.align.objectives import InfoNCE, RegionAlign, SigLIP, box_targets, centre_cell
from mmllm.contracts import AlignBatch, Stream


def pair_batch(a, b, scale=1.0, bias=0.0, labels=None):
    streams = {"image": Stream(embedding=a), "text": Stream(embedding=b)}
    return AlignBatch(
        streams,
        labels=labels,
        logit_scale={"image:text": torch.tensor(scale)},
        logit_bias={"image:text": torch.tensor(bias)},
    )


def test_infonce_of_orthonormal_pairs_has_its_closed_form():
    eye = torch.eye(4)
    loss = InfoNCE(["image", "text"])(pair_batch(eye, eye, scale=3.0))["loss"]
    torch.testing.assert_close(loss, torch.full((4,), math.log(math.exp(3) + 3) - 3))


def test_infonce_of_a_collapsed_model_is_log_of_the_batch():
    same = F.normalize(torch.ones(5, 3), dim=-1)
    loss = InfoNCE(["image", "text"])(pair_batch(same, same, scale=50.0))["loss"]
    torch.testing.assert_close(loss.mean(), torch.tensor(math.log(5.0)))


def test_infonce_equals_two_cross_entropies():
    torch.manual_seed(0)
    a, b = (F.normalize(torch.randn(6, 8), dim=-1) for _ in range(2))
    logits, y = 7.0 * a @ b.T, torch.arange(6)
    expected = (F.cross_entropy(logits, y) + F.cross_entropy(logits.T, y)) / 2
    torch.testing.assert_close(InfoNCE(["image", "text"])(pair_batch(a, b, 7.0))["loss"].mean(), expected)
    smooth = (F.cross_entropy(logits, y, label_smoothing=0.1) + F.cross_entropy(logits.T, y, label_smoothing=0.1)) / 2
    got = InfoNCE(["image", "text"], label_smoothing=0.1)(pair_batch(a, b, 7.0))["loss"].mean()
    torch.testing.assert_close(got, smooth)


def test_items_of_one_label_are_positives_not_negatives():
    a = torch.eye(3)[[0, 0, 1]]
    plain = InfoNCE(["image", "text"], same_label=False)(pair_batch(a, a, 20.0, labels=["x", "x", "y"]))["loss"]
    aware = InfoNCE(["image", "text"])(pair_batch(a, a, 20.0, labels=["x", "x", "y"]))["loss"]
    # Two equal columns share the probability: log 2 for each of the twins, whichever the target is.
    torch.testing.assert_close(plain[:2], torch.full((2,), math.log(2.0)), atol=1e-4, rtol=0)
    torch.testing.assert_close(aware[:2], torch.full((2,), math.log(2.0)), atol=1e-4, rtol=0)
    # A twin that differs is punished as a negative only without labels.
    a = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    target = torch.tensor([[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 1.0]])
    logits = 5.0 * a @ a.T
    expected = -(target * logits.log_softmax(-1)).sum(-1)
    got = InfoNCE(["image", "text"])(pair_batch(a, a, 5.0, labels=["x", "x", "y"]))["loss"]
    torch.testing.assert_close(got, expected)


def test_infonce_does_not_depend_on_the_order_of_items():
    torch.manual_seed(1)
    a, b = (F.normalize(torch.randn(6, 8), dim=-1) for _ in range(2))
    order = torch.randperm(6)
    one = InfoNCE(["image", "text"])(pair_batch(a, b, 9.0))["loss"]
    two = InfoNCE(["image", "text"])(pair_batch(a[order], b[order], 9.0))["loss"]
    torch.testing.assert_close(one[order], two)


def test_siglip_of_orthonormal_pairs_has_its_closed_form():
    eye = torch.eye(3)
    loss = SigLIP(["image", "text"])(pair_batch(eye, eye, scale=10.0, bias=-4.0))["loss"]
    softplus = lambda x: math.log1p(math.exp(x))  # noqa: E731
    torch.testing.assert_close(loss, torch.full((3,), softplus(-6) + 2 * softplus(-4)))


def test_siglip_equals_binary_cross_entropy_of_all_pairs():
    torch.manual_seed(2)
    a, b = (F.normalize(torch.randn(5, 8), dim=-1) for _ in range(2))
    logits = 10 * a @ b.T - 3
    expected = F.binary_cross_entropy_with_logits(logits, torch.eye(5), reduction="sum") / 5
    torch.testing.assert_close(SigLIP(["image", "text"])(pair_batch(a, b, 10.0, -3.0))["loss"].mean(), expected)


@pytest.mark.parametrize(
    ("xyxy", "cells"),
    [
        ([0.0, 0.0, 0.5, 0.5], {(0, 0), (0, 1), (1, 0), (1, 1)}),
        ([0.25, 0.5, 0.75, 0.75], {(2, 1), (2, 2)}),
        ([0.3, 0.3, 0.32, 0.32], {(1, 1)}),  # smaller than a cell: the cell of its centre
        ([0.9, 0.9, 1.0, 1.0], {(3, 3)}),
        ([0.13, 0.0, 0.9, 0.13], {(0, 1), (0, 2), (0, 3)}),  # centres at .125, .375, .625, .875
    ],
)
def test_box_targets_are_the_cells_whose_centres_lie_inside(xyxy, cells):
    target = box_targets([{"xyxy": xyxy, "text": "a"}], (4, 4), {"a": 0}).view(4, 4)
    assert {(int(r), int(c)) for r, c in (target == 0).nonzero()} == cells
    row, column = centre_cell(xyxy, (4, 4))
    assert target[row, column] == 0


def test_later_boxes_lie_on_top_but_every_centre_keeps_its_word():
    boxes = [{"xyxy": [0, 0, 1, 1], "text": "a"}, {"xyxy": [0, 0, 0.5, 1], "text": "b"}]
    target = box_targets(boxes, (4, 4), {"a": 0, "b": 1}).view(4, 4)
    expected = torch.tensor([[1, 1, 0, 0]] * 4)
    assert torch.equal(target, expected)
    assert box_targets([], (2, 2), {"a": 0}).tolist() == [1, 1, 1, 1]


def region_batch(tokens, words, boxes=None, labels=None, grid=None):
    mask = torch.ones(tokens.shape[:2], dtype=torch.bool)
    stream = Stream(token_embedding=tokens, token_mask=mask, grid=grid)
    index = {name: i for i, name in enumerate("abc")}
    return AlignBatch(
        {"image": stream}, labels=labels, boxes=boxes, extras={"vocabulary": {"index": index, "embedding": words}}
    )


def test_region_align_equals_weighted_cross_entropy_over_centred_cosines():
    torch.manual_seed(3)
    words, tokens = torch.randn(3, 8) + 2, torch.randn(2, 4, 8)
    objective = RegionAlign("image", 8, scale=5.0, background_weight=0.25, norm_weight=0.0)
    boxes = [[{"xyxy": [0, 0, 0.5, 0.5], "text": "c"}], [{"xyxy": [0.5, 0, 1, 1], "text": "a"}]]
    got = objective(region_batch(tokens, words, boxes, grid=(1, 2, 2)))["loss"]
    centre = words.mean(0)
    table = torch.cat([words - centre, objective.background[None]])
    logits = 5.0 * F.cosine_similarity((tokens - centre)[:, :, None], table[None, None], dim=-1)
    target = torch.tensor([[2, 3, 3, 3], [3, 0, 3, 0]])
    weight = torch.tensor([1, 1, 1, 0.25])
    torch.testing.assert_close(got, F.cross_entropy(logits.flatten(0, 1), target.flatten(), weight=weight))


def test_region_align_of_the_words_themselves_is_nearly_nothing():
    torch.manual_seed(4)
    words = torch.randn(3, 64) * 3
    tokens = words[[0, 2]][:, None].expand(2, 4, 64)
    out = RegionAlign("image", 64, scale=50.0)(region_batch(tokens, words, labels=["a", "c"]))
    assert out["loss"] < 0.05 and out["word_accuracy"] == 1
    wrong = RegionAlign("image", 64, scale=50.0)(region_batch(tokens, words, labels=["b", "a"]))
    assert wrong["loss"] > 10 and wrong["word_accuracy"] == 0


def test_the_pull_is_the_mean_distance_of_named_cells_from_their_words():
    torch.manual_seed(6)
    words, tokens = torch.randn(3, 8) + 2, torch.randn(2, 4, 8)
    boxes = [[{"xyxy": [0, 0, 0.5, 0.5], "text": "c"}], [{"xyxy": [0.5, 0, 1, 1], "text": "a"}]]
    objective = RegionAlign("image", 8)
    batch = region_batch(tokens, words, boxes, grid=(1, 2, 2))
    without = objective(batch)["loss"]
    objective.pull_weight = 0.5
    out = objective(batch)
    around, offset = words - words.mean(0), tokens - words.mean(0)
    named = torch.stack([offset[0, 0], offset[1, 1], offset[1, 3]]), torch.stack([around[2], around[0], around[0]])
    cosine = F.cosine_similarity(*named).mean()
    torch.testing.assert_close(out["loss"] - without, 0.5 * (1 - cosine))
    torch.testing.assert_close(out["word_cosine"], cosine)


def test_region_align_ignores_masked_tokens():
    torch.manual_seed(5)
    words, tokens = torch.randn(3, 8), torch.randn(1, 4, 8)
    objective = RegionAlign("image", 8)
    short = objective(region_batch(tokens[:, :2], words, labels=["a"]))["loss"]
    batch = region_batch(tokens, words, labels=["a"])
    batch.streams["image"].token_mask[:, 2:] = False
    torch.testing.assert_close(objective(batch)["loss"], short)
