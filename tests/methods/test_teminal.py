"""TeminAL's oracles: the catalogue's entry 75."""

from __future__ import annotations

import json
import math

import pytest
import torch

from mmllm.align.objectives import InfoNCE
from mmllm.config import parse_config
from mmllm.errors import UserError
from mmllm.methods.teminal import TeminAL
from mmllm.train.align import AlignConfig, align
from tests.align.conftest import settings, world  # noqa: F401

PAIR = ["audio", "text"]


def about(pairs, kinds=("forward", "reversed")):
    items = [(n, k) for k in kinds for n in range(pairs)]
    return {
        "ids": [f"{n}-{k}" for n, k in items],
        "labels": [f"{n}-{k}" for n, k in items],
        "groups": [str(n) for n, _ in items],
        "extras": {"meta": [{"kind": k} for _, k in items]},
    }


@pytest.fixture
def batch(make_batch, unit):
    return make_batch({"audio": unit(8, 6), "text": unit(8, 6, seed=1)}, **about(4))


def part(make_batch, batch, rows):
    return InfoNCE(PAIR)(make_batch({s: batch.streams[s].embedding[rows] for s in PAIR}))["loss"]


def test_ones_are_infonce_on_both_halves(make_batch, batch):
    torch.testing.assert_close(TeminAL(PAIR)(batch)["loss"], part(make_batch, batch, slice(None)))


def test_zeros_are_two_separate_infonces(make_batch, batch):
    out = TeminAL(PAIR, alpha_same=0, alpha_cross=0)(batch)["loss"]
    halves = torch.cat([part(make_batch, batch, slice(0, 4)), part(make_batch, batch, slice(4, 8))])
    torch.testing.assert_close(out, halves, atol=1e-4, rtol=1e-4)
    only = TeminAL(PAIR, alpha_same=0, alpha_cross=0, weights={"reversed": 0})(batch)["loss"]
    torch.testing.assert_close(only.mean(), halves[:4].mean(), atol=1e-4, rtol=1e-4)
    assert (only[4:] == 0).all()


def test_blocks_get_their_own_weights(batch):
    made = TeminAL(PAIR, alpha_same=3.0, alpha_cross=0.5, weights={"reversed": 0.25})
    x, y = (batch.streams[s].embedding for s in PAIR)
    half = torch.arange(8) // 4
    twin = torch.arange(8)[:, None] % 4 == torch.arange(8)[None] % 4
    factor = torch.where(half[:, None] == half[None], 1.0, torch.where(twin, 3.0, 0.5))
    logits = 10 * x @ y.T
    forth = (factor * logits.exp()).sum(1).log() - logits.diagonal()
    back = (factor * logits.exp()).sum(0).log() - logits.diagonal()
    weight = torch.where(half == 0, 1.0, 0.25)
    expected = ((forth + back) / 2 * weight).sum() / weight.sum()
    torch.testing.assert_close(made(batch)["loss"].mean(), expected)


def test_a_third_kind_is_a_third_block(make_batch, unit):
    rows = {"audio": unit(6, 6), "text": unit(6, 6, seed=1)}
    batch = make_batch(rows, **about(2, ("forward", "reversed", "overlay")))
    out = TeminAL(PAIR, alpha_same=0, alpha_cross=0)(batch)["loss"]
    expected = torch.cat([part(make_batch, batch, slice(i, i + 2)) for i in (0, 2, 4)])
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)


def test_an_encoder_without_order_cannot_go_below_log_two(make_batch):
    """Sounds are the same both ways round: half of the probability goes to the twin, however good the rest is."""
    audio = torch.eye(4).repeat(2, 1)
    batch = make_batch({"audio": audio, "text": audio.clone()}, scale=200.0, **about(4))
    torch.testing.assert_close(TeminAL(PAIR)(batch)["loss"], torch.full((8,), math.log(2)))
    for seed in range(3):  # and no text does better against them
        text = torch.nn.functional.normalize(torch.randn(8, 4, generator=torch.Generator().manual_seed(seed)), dim=-1)
        logits = 50 * text @ audio.T
        assert torch.nn.functional.cross_entropy(logits, torch.arange(8)) >= math.log(2)


def test_one_label_is_no_negative(make_batch, unit):
    known = about(2)
    known["labels"] = ["x, y", "y, x", "y, x", "x, y"]  # pair 1 is pair 0 the other way round
    batch = make_batch({"audio": unit(4, 6), "text": unit(4, 6, seed=1)}, **known)
    logits = 10 * batch.streams["audio"].embedding @ batch.streams["text"].embedding.T
    forth = torch.stack([logits[0, 0], logits[0, 1], logits[0, 2]]).logsumexp(0) - logits[0, 0]
    back = torch.stack([logits[0, 0], logits[1, 0], logits[2, 0]]).logsumexp(0) - logits[0, 0]
    torch.testing.assert_close(TeminAL(PAIR)(batch)["loss"][0], (forth + back) / 2)


def test_items_without_sound_do_not_count(make_batch, unit):
    x, y, known = unit(4, 6), unit(4, 6, seed=1), about(2)
    batch = make_batch({"audio": x[[0, 2, 3]], "text": y}, **known)
    batch.streams["audio"].owner = torch.tensor([0, 2, 3])
    out = TeminAL(PAIR)(batch)
    assert out["valid"].tolist() == [True, False, True, True] and out["loss"][1] == 0
    expected = InfoNCE(PAIR)(make_batch({"audio": x[[0, 2, 3]], "text": y[[0, 2, 3]]}))["loss"]
    torch.testing.assert_close(out["loss"][[0, 2, 3]], expected)


def test_mistakes_are_named():
    with pytest.raises(UserError, match="did you mean 'reversed'"):
        TeminAL(PAIR, weights={"reverse": 1})
    with pytest.raises(UserError, match="must not be below 0"):
        TeminAL(PAIR, alpha_same=-1)


def test_a_run_by_the_cards_line(settings, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("MMLLM_CACHE", str(tmp_path / "cache"))
    source = {
        "data": "sounds_train.jsonl", "streams": ["audio", "text"],
        "recipes": [{"type": "sound_pairs", "count": 12}],
        "sampler": {"type": "k_per_group", "by": "group", "options": {"k": 2}},
    }  # fmt: skip
    settings["phases"] = {
        "one": {
            "sources": {"pairs": source},
            "objectives": [{"type": "teminal", "options": {"pair": ["audio", "text"]}}],
            "trains": ["audio.tower", "audio.head", "text.head"],
            "train": {"max_steps": 3},
        }
    }
    options = {"count": 10}
    settings["measures"] = {
        "time": {"kind": "zste", "data": "sounds_val.jsonl", "streams": ["audio", "text"], "options": options}
    }
    align(parse_config(settings, AlignConfig), tmp_path / "run")
    figures = {f["name"]: f for f in json.loads(next(tmp_path.rglob("results.json")).read_text())["figures"]}
    assert set(figures) == {"time_one", "time_both", "time_order", "time_overlay"}
    assert figures["time_order"]["n"] == 40 and figures["time_order"]["chance"] == 0.5
    assert figures["time_one"]["chance"] == pytest.approx(1 / 8)
