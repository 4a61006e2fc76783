"""FILIP's oracles: the catalogue's entry 8."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mmllm.align.objectives import InfoNCE
from mmllm.errors import UserError
from mmllm.methods.filip import Filip

PAIR = ["image", "text"]


def loss(batch, **options):
    return Filip(PAIR, **options)(batch)["loss"]


def test_one_token_each_is_infonce(make_batch, unit):
    a, b = unit(5, 8), unit(5, 8, seed=1)
    tokens = make_batch({"image": (a[:, None], None), "text": (b[:, None], None)})
    torch.testing.assert_close(loss(tokens), InfoNCE(PAIR)(make_batch({"image": a, "text": b}))["loss"])


def test_equals_the_two_matrices_written_out(make_batch, unit):
    x, y = unit(4, 3, 8), unit(4, 5, 8, seed=1)
    mask = torch.arange(5) < torch.tensor([5, 2, 3, 1])[:, None]
    image, text = torch.zeros(4, 4), torch.zeros(4, 4)
    for i in range(4):
        for j in range(4):
            alike = x[i] @ y[j][mask[j]].T
            image[i, j], text[i, j] = alike.max(1).values.mean(), alike.max(0).values.mean()
    target = torch.arange(4)
    expected = (F.cross_entropy(10 * image, target) + F.cross_entropy(10 * text.T, target)) / 2
    torch.testing.assert_close(loss(make_batch({"image": (x, None), "text": (y, mask)})).mean(), expected)


def test_padding_and_order_change_nothing(make_batch, unit):
    x, y, mask = unit(4, 3, 8), unit(4, 5, 8, seed=1), torch.arange(5) < 3
    mask = mask.expand(4, 5)
    expected = loss(make_batch({"image": (x, None), "text": (y, mask)}))
    other = torch.where(mask[..., None], y, unit(4, 5, 8, seed=2))
    torch.testing.assert_close(loss(make_batch({"image": (x, None), "text": (other, mask)})), expected)
    turned = make_batch({"image": (x[:, [2, 0, 1]], None), "text": (y[:, [2, 1, 0, 3, 4]], mask)})
    torch.testing.assert_close(loss(turned), expected)


def test_a_word_said_twice_changes_the_texts_view_alone(unit):
    scorer = Filip(PAIR).scorer
    ones = lambda n: torch.ones(4, n, dtype=torch.bool)  # noqa: E731
    x, y = (unit(4, 3, 8), ones(3)), unit(4, 2, 8, seed=1)
    twice = torch.cat([y, y[:, :1]], 1)
    image = scorer.score(x, (y, ones(2)))
    torch.testing.assert_close(scorer.score(x, (twice, ones(3))), image)
    assert not torch.allclose(scorer.score((twice, ones(3)), x), scorer.score((y, ones(2)), x))
    assert (image <= 1).all()
    torch.testing.assert_close(scorer.score(x, x).diagonal(), torch.ones(4))


def test_dropping_keeps_the_best_tokens(make_batch, unit):
    x, y = unit(4, 8, 16), unit(4, 4, 16, seed=1)
    x[:, 5] = y[:, 0]  # the only patch that is a word
    batch = make_batch({"image": (x, None), "text": (y, None)})
    full = torch.ones(4, 8, dtype=torch.bool)
    kept = Filip(PAIR, keep=0.1).kept((x, full), (y, torch.ones(4, 4, dtype=torch.bool)))
    assert kept.sum(1).tolist() == [1] * 4 and kept[:, 5].all()
    assert not torch.allclose(loss(batch, keep=0.25), loss(batch))
    with pytest.raises(UserError, match="keep must be above 0"):
        Filip(PAIR, keep=0)
