"""CWCL's oracles: the catalogue's entry 6."""

from __future__ import annotations

import pytest
import torch

from mmllm.align.objectives import InfoNCE
from mmllm.config import parse_config
from mmllm.errors import UserError
from mmllm.methods.cwcl import CWCL
from mmllm.train.align import align
from mmllm.train.align_config import AlignConfig
from tests.align.conftest import settings, world  # noqa: F401

PAIR = ["text", "audio"]


def losses(p, q, make_batch, **options):
    return CWCL(PAIR, **options)(make_batch({"text": p, "audio": q}))["loss"]


def written_out(p, q, power=1.0, scale=10.0):
    logits = scale * p @ q.T
    w = ((1 + p @ p.T) / 2) ** power
    w = w / w.sum(1, keepdim=True)
    weighted = -(w * logits.log_softmax(1)).sum(1)
    return 0.5 * (weighted - logits.T.log_softmax(1).diagonal()), w, logits


@pytest.mark.parametrize("power", [1.0, 3.0])
def test_equals_the_formula(power, make_batch, unit):
    p, q = unit(6, 5), unit(6, 5, seed=1)
    torch.testing.assert_close(losses(p, q, make_batch, power=power), written_out(p, q, power)[0])


def test_trained_anchor_turns_the_weighted_direction(make_batch, unit):
    p, q = unit(6, 5), unit(6, 5, seed=1)
    _, w, logits = written_out(p, q)
    expected = 0.5 * (-(w * logits.T.log_softmax(1)).sum(1) - logits.log_softmax(1).diagonal())
    torch.testing.assert_close(losses(p, q, make_batch, anchor="trained"), expected)


def test_gradient_and_least_value(make_batch, unit):
    p, q = unit(6, 5), unit(6, 5, seed=1)
    _, w, logits = written_out(p, q)
    weighted = (logits.log_softmax(1).exp() - w) / 6
    other = (logits.T.log_softmax(1).exp() - torch.eye(6)) / 6
    at = q.clone().requires_grad_()
    losses(p, at, make_batch).mean().backward()
    torch.testing.assert_close(at.grad, 0.5 * 10 * (weighted.T @ p + other @ p))
    # Free logits reach the entropy of the targets' rows and no less.
    free = w.log().clone().requires_grad_()
    least = -(w * free.log_softmax(1)).sum(1)
    torch.testing.assert_close(least, torch.special.entr(w).sum(1))
    assert torch.autograd.grad(least.sum(), free)[0].abs().max() < 1e-6


def test_opposite_embeddings_are_infonce_and_equal_ones_spread_evenly(make_batch, unit):
    q = unit(2, 5)
    p = torch.stack([unit(5), -unit(5)])  # w = 0 between opposite vectors, 1 with itself
    expected = InfoNCE(PAIR)(make_batch({"text": p, "audio": q}))["loss"]
    torch.testing.assert_close(losses(p, q, make_batch), expected)
    same, q = unit(1, 5).expand(4, 5), unit(4, 5)
    logits = 10 * same @ q.T
    even = -logits.log_softmax(1).mean(1)
    torch.testing.assert_close(losses(same, q, make_batch), 0.5 * (even - logits.T.log_softmax(1).diagonal()))


def test_nothing_flows_into_the_frozen_stream(make_batch, unit):
    p, q = unit(4, 5).requires_grad_(), unit(4, 5, seed=1).requires_grad_()
    losses(p, q, make_batch).sum().backward()
    assert p.grad is None and q.grad.abs().sum() > 0


def test_a_frozen_item_said_twice_is_an_equal_positive(make_batch, unit):
    p, q = unit(4, 5), unit(4, 5, seed=1)
    p = torch.cat([p, p[:1]])
    q = torch.cat([q, unit(1, 5, seed=2)])
    swapped = q[[4, 1, 2, 3, 0]]
    batch = {"text": p, "audio": q}, {"text": p, "audio": swapped}
    one, two = (CWCL(PAIR, same_label=True)(make_batch(b, labels=list("abcda")))["loss"] for b in batch)
    torch.testing.assert_close(one[1:4], two[1:4])
    weighted = -(written_out(p, q)[1] * written_out(p, q)[2].log_softmax(1)).sum(1)
    torch.testing.assert_close(weighted[0], weighted[4])


def test_items_that_lack_a_stream_take_no_part(make_batch, unit):
    p, q = unit(5, 4), unit(3, 4, seed=1)
    batch = make_batch({"text": p, "audio": q}, ids=list("abcde"))
    batch.streams["audio"].owner = torch.tensor([1, 2, 4])
    out = CWCL(PAIR)(batch)
    assert out["valid"].tolist() == [False, True, True, False, True]
    torch.testing.assert_close(out["loss"][out["valid"]], losses(p[[1, 2, 4]], q, make_batch))


def test_mistakes_are_named():
    with pytest.raises(UserError, match="did you mean 'frozen'"):
        CWCL(PAIR, anchor="frosen")
    with pytest.raises(UserError, match="power must be above 0"):
        CWCL(PAIR, power=0)


def test_a_run_with_a_frozen_text_tower(settings, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("MMLLM_CACHE", str(tmp_path / "cache"))
    settings["embedding_dim"] = 32
    settings["streams"]["text"]["head"] = {"identity": True}
    both = settings["phases"]["both"]
    both["sources"] = {"sounds": both["sources"]["sounds"] | {"captions": "first"}}
    both |= {"objectives": [{"type": "cwcl", "options": {"pair": PAIR}}], "trains": ["audio.head"]}
    both["train"] = {"max_steps": 3, "logging_steps": 1}
    settings["phases"] = {"both": both}
    settings["measures"] = {"sounds": {"kind": "retrieval", "data": "sounds_val.jsonl", "streams": ["audio", "text"]}}
    out = align(parse_config(settings, AlignConfig), tmp_path / "run")
    assert "cwcl:text:audio" in (out / "metrics.jsonl").read_text()
