"""GLSCL's oracles: the catalogue's entry 81."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from mmllm.align.objectives import InfoNCE
from mmllm.config import parse_config
from mmllm.errors import UserError
from mmllm.methods.glscl import GLSCL, by_frame, consistency, diversity, text_conditioned
from mmllm.train.align import AlignConfig, align
from tests.align.conftest import settings, world  # noqa: F401

PAIR = ["video", "text"]


def made(**options):
    objective = GLSCL(PAIR, queries=3, layers=2, heads=2, **options)
    torch.manual_seed(0)
    objective.setup(SimpleNamespace(embedding_dim=8))
    return objective


def test_text_weighs_the_frames(unit):
    text, frames = 4 * unit(3, 8), 3 * unit(2, 5, 8, seed=1)
    mask = torch.arange(5) < torch.tensor([5, 3])[:, None]
    found = text_conditioned(text, frames, mask)
    for a in range(3):
        for b in range(2):
            held = frames[b, mask[b]]
            pooled = (text[a] @ held.T / 3).softmax(0) @ held
            torch.testing.assert_close(found[a, b], F.cosine_similarity(text[a], pooled, dim=0))
    flat = text_conditioned(text, frames, mask, temperature=1e9)
    mean = torch.stack([f[m].mean(0) for f, m in zip(frames, mask)])
    torch.testing.assert_close(flat, F.normalize(text, dim=-1) @ F.normalize(mean, dim=-1).T)


def test_one_frame_and_no_concepts_is_infonce(make_batch, unit):
    x, y = unit(4, 8), unit(4, 8, seed=1)
    tokens = make_batch({"video": (x[:, None], None), "text": (y[:, None], None)})
    expected = InfoNCE(PAIR)(make_batch({"video": x, "text": y}))["loss"]
    torch.testing.assert_close(made(local=0)(tokens)["loss"], expected)


def test_the_score_has_a_local_half(make_batch, unit):
    batch = make_batch({"video": (unit(4, 3, 8), None), "text": (unit(4, 5, 8, seed=1), None)})
    objective = made(consistency_weight=0, diversity_weight=0, text_token="mean")
    (frames, mask, seen), _ = objective._rows(batch, "video")
    (text, words), _ = objective._rows(batch, "text")
    assert seen.shape == words.shape == (4, 3, 8)
    sim = text_conditioned(text, frames, mask) + 0.5 * torch.einsum("aqd,bqd->ab", words, seen) / 3
    target = torch.arange(4)
    halves = [F.cross_entropy(10 * s, target, reduction="none") for s in (sim, sim.T)]
    torch.testing.assert_close(objective(batch)["loss"], (halves[0] + halves[1]) / 2)


def test_diversity_has_its_closed_form(unit):
    queries = F.normalize(unit(6, 4, 8) + 4 * unit(6, 1, 8, seed=1), dim=-1)  # near one another
    gram = torch.einsum("bqd,brd->qr", queries, queries) / 6
    off = ~torch.eye(4, dtype=torch.bool)
    assert (gram[off] > 0.9).any()
    torch.testing.assert_close(diversity(queries), 2 * (gram - 0.9).relu()[off].mean())
    assert diversity(torch.eye(4, 8).expand(6, 4, 8)) == 0


def test_consistency_is_least_at_a_cosine_of_three_quarters():
    x = torch.eye(4, 8).expand(5, 4, 8)
    cosine = torch.full((4,), 0.75)
    y = 0.75 * x + (1 - cosine**2).sqrt()[:, None] * torch.eye(8)[4:]
    distance = F.mse_loss(x.mean(0), y.mean(0))
    torch.testing.assert_close(consistency(x, y, 1.0), distance)
    torch.testing.assert_close(consistency(x, x, 1.0), torch.tensor(4 * 0.25**2))


def test_padding_and_decoder_change_nothing_where_they_should_not(make_batch, unit):
    x, y, mask = unit(4, 4, 8), unit(4, 5, 8, seed=1), (torch.arange(4) < 3).expand(4, 4)
    objective = made()
    expected = objective(make_batch({"video": (x, mask), "text": (y, None)}))["loss"]
    other = torch.where(mask[..., None], x, 5 * unit(4, 4, 8, seed=2))
    torch.testing.assert_close(objective(make_batch({"video": (other, mask), "text": (y, None)}))["loss"], expected)
    less = make_batch({"video": (x[:, :3], None), "text": (y, None)})
    torch.testing.assert_close(objective(less)["loss"], expected)
    before = text_conditioned(y[:, 0], x, mask)
    with torch.no_grad():
        for p in objective.parameters():
            p.add_(torch.randn_like(p))
    assert not torch.allclose(objective(less)["loss"], expected)
    torch.testing.assert_close(text_conditioned(y[:, 0], x, mask), before)


def test_frames_are_means_of_their_tokens(unit):
    tokens, mask = unit(2, 6, 8), torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 0, 1, 0, 0]]).bool()
    frames, valid = by_frame(tokens, mask, 3)
    assert valid.tolist() == [[True, True, False]] * 2
    torch.testing.assert_close(frames[0, 0], tokens[0, :2].mean(0))
    torch.testing.assert_close(frames[1, 1], tokens[1, 3])
    with pytest.raises(UserError, match="no multiple of 4 frames"):
        by_frame(tokens, mask, 4)


def test_items_without_a_video_do_not_count(make_batch, unit):
    x, y = unit(4, 3, 8), unit(4, 5, 8, seed=1)
    full = make_batch({"video": (x[[0, 2, 3]], None), "text": (y, None)}, ids=list("abcd"))
    full.streams["video"].owner = torch.tensor([0, 2, 3])
    out = made()(full)
    less = made()(make_batch({"video": (x[[0, 2, 3]], None), "text": (y[[0, 2, 3]], None)}))
    assert out["valid"].tolist() == [True, False, True, True]
    torch.testing.assert_close(out["loss"][[0, 2, 3]], less["loss"])


def test_mistakes_are_named():
    with pytest.raises(UserError, match="'first' or 'mean'"):
        GLSCL(PAIR, text_token="last")


def test_a_run_by_the_cards_line(settings, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("MMLLM_CACHE", str(tmp_path / "cache"))
    image, text = settings["streams"]["image"], settings["streams"]["text"]
    linear = {"type": "linear"}
    settings["streams"] = {
        "video": {"modality": "video", "tower": image["tower"], "connector": linear},
        "text": {**text, "connector": linear},
    }
    settings.pop("words")
    recipes = [{"type": "bags", "count": 16}]
    settings["phases"] = {
        "one": {
            "sources": {"bags": {"data": "things_train.jsonl", "recipes": recipes, "streams": PAIR, "frames": 4}},
            "objectives": [{"type": "glscl", "options": {"pair": PAIR, "frames": 4}}],
            "trains": ["video.connector", "text.connector"],
            "train": {"max_steps": 3, "logging_steps": 1},
        }
    }
    settings["measures"] = {
        "bags": {
            "kind": "glscl", "data": "things_val.jsonl", "recipes": recipes, "streams": PAIR, "frames": 4,
            "options": {"frames": 4},
        }
    }  # fmt: skip
    align(parse_config(settings, AlignConfig), tmp_path / "run")
    assert "consistency" in next(tmp_path.rglob("metrics.jsonl")).read_text()
    figures = {f["name"]: f for f in json.loads(next(tmp_path.rglob("results.json")).read_text())["figures"]}
    assert figures["bags_text_to_video_r1"]["n"] == 8 and figures["bags_video_to_text_r1"]["n"] == 16
