"""CiCo's oracles: the catalogue's entry 58."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from mmllm.align.objectives import InfoNCE
from mmllm.align.scorers import LateInteraction
from mmllm.config import parse_config
from mmllm.errors import UserError
from mmllm.methods.cico import CiCo, CiCoScorer, soft_alignment
from mmllm.train.align import AlignConfig, align
from tests.align.conftest import settings, world  # noqa: F401

PAIR = ["video", "text"]


@pytest.fixture
def sides(unit):
    x, y = unit(4, 3, 8), unit(4, 5, 8, seed=1)
    return (x, torch.ones(4, 3).bool()), (y, torch.arange(5) < torch.tensor([5, 2, 3, 1])[:, None])


def test_a_cold_softmax_is_late_interaction_and_a_hot_one_the_mean(sides):
    v, w = sides
    torch.testing.assert_close(soft_alignment(v, w, 1e-4), LateInteraction().score(v, w), atol=1e-4, rtol=0)
    hot = soft_alignment(v, w, 1e6)
    torch.testing.assert_close(hot, soft_alignment(w, v, 1e6).T)
    mean = torch.stack([torch.stack([(x @ y[m].T).mean() for y, m in zip(*w)]) for x in v[0]])
    torch.testing.assert_close(hot, mean)


def test_the_softmax_written_out(sides):
    (x, _), (y, mask) = sides
    found = soft_alignment(*sides, 0.2)
    for a in range(4):
        for b in range(4):
            e = x[a] @ y[b, mask[b]].T
            torch.testing.assert_close(found[a, b], ((e / 0.2).softmax(1) * e).sum(1).mean())


def test_one_token_a_side_is_infonce(make_batch, unit):
    x, y = unit(4, 8), unit(4, 8, seed=1)
    batch = make_batch({"video": (x[:, None], None), "text": (y[:, None], None)})
    expected = InfoNCE(PAIR)(make_batch({"video": x, "text": y}))["loss"]
    for own in (1.0, 0.5, 0.0):
        torch.testing.assert_close(CiCo(PAIR, own=own)(batch)["loss"], expected)


def test_padding_changes_nothing(make_batch, sides, unit):
    (x, _), (y, mask) = sides
    expected = CiCo(PAIR)(make_batch({"video": (x, None), "text": (y, mask)}))["loss"]
    longer = torch.cat([torch.where(mask[..., None], y, unit(4, 5, 8, seed=5)), unit(4, 2, 8, seed=2)], 1)
    batch = make_batch({"video": (x, None), "text": (longer, F.pad(mask, (0, 2)))})
    torch.testing.assert_close(CiCo(PAIR)(batch)["loss"], expected)


def test_each_matrix_is_supervised_in_its_own_direction_or_both(make_batch, sides):
    v, w = sides
    batch = make_batch({"video": v, "text": w})
    first, second = 10 * soft_alignment(v, w, 0.07), 10 * soft_alignment(w, v, 0.07).T
    target = torch.arange(4)
    ce = lambda z: F.cross_entropy(z, target, reduction="none")  # noqa: E731
    for own in (1.0, 0.3):
        one = own * ce(first) + (1 - own) * ce(first.T)
        two = own * ce(second.T) + (1 - own) * ce(second)
        torch.testing.assert_close(CiCo(PAIR, own=own)(batch)["loss"], (one + two) / 2)


def test_an_augmented_text_stands_in_its_own_matrix_alone(make_batch, sides, unit):
    v, w = sides
    other = (unit(4, 2, 8, seed=7), torch.ones(4, 2).bool())
    batch = make_batch({"video": v, "text": w, "text@dropped": other})
    target = torch.arange(4)
    first, second = 10 * soft_alignment(v, w, 0.07), 10 * soft_alignment(other, v, 0.07)
    expected = sum(F.cross_entropy(z, target, reduction="none") for z in (first, second)) / 2
    made = CiCo(PAIR, augmented="text@dropped")
    assert "text@dropped.token_embedding" in made.needs
    torch.testing.assert_close(made(batch)["loss"], expected)


def test_retrieval_goes_by_the_mean_of_both(sides):
    v, w = sides
    scorer = CiCoScorer()
    torch.testing.assert_close(scorer.score(v, w), scorer.score(w, v).T)
    torch.testing.assert_close(scorer.score(v, w), (soft_alignment(v, w, 0.07) + soft_alignment(w, v, 0.07).T) / 2)


def test_items_without_text_do_not_count(make_batch, sides):
    (x, _), (y, mask) = sides
    full = make_batch({"video": (x, None), "text": (y[[0, 2, 3]], mask[[0, 2, 3]])})
    full.streams["text"].owner = torch.tensor([0, 2, 3])
    out = CiCo(PAIR)(full)
    less = CiCo(PAIR)(make_batch({"video": (x[[0, 2, 3]], None), "text": (y[[0, 2, 3]], mask[[0, 2, 3]])}))
    assert out["valid"].tolist() == [True, False, True, True]
    torch.testing.assert_close(out["loss"][[0, 2, 3]], less["loss"])


def test_mistakes_are_named():
    with pytest.raises(UserError, match=r"own must be in 0\.\.1"):
        CiCo(PAIR, own=2)
    with pytest.raises(UserError, match="temperature must be above 0"):
        CiCo(PAIR, temperature=0)


def test_a_run_by_the_cards_line(settings, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("MMLLM_CACHE", str(tmp_path / "cache"))
    image, text = settings["streams"]["image"], settings["streams"]["text"]
    settings["streams"] = {
        "video": {"modality": "video", "tower": image["tower"], "connector": {"type": "avg_pool", "tokens": 3}},
        "text": {**text, "connector": {"type": "linear"}},
        "text@dropped": {"of": "text", "transforms": ["word_dropout"], "cache": False},
    }
    settings.pop("words")
    recipes = [{"type": "sequence", "length": 3, "joined": ", "}]
    source = {"data": "things_train.jsonl", "recipes": recipes, "streams": PAIR, "frames": 3}
    settings["phases"] = {
        "one": {
            "sources": {"sequences": source},
            "objectives": [{"type": "cico", "options": {"pair": PAIR, "augmented": "text@dropped"}}],
            "trains": ["video.connector", "text.connector"],
            "train": {"max_steps": 3},
        }
    }
    settings["measures"] = {
        "sequences": {
            "kind": "pairs", "data": "things_val.jsonl", "recipes": recipes, "streams": PAIR, "frames": 3,
            "scorer": "cico",
        }
    }  # fmt: skip
    align(parse_config(settings, AlignConfig), tmp_path / "run")
    figures = {f["name"]: f for f in json.loads(next(tmp_path.rglob("results.json")).read_text())["figures"]}
    assert figures["sequences_video_to_text_r1"]["n"] == 16
