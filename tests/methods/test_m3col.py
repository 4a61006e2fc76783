"""M3CoL's oracles: the catalogue's entry 18."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F

from mmllm.align.objectives import InfoNCE
from mmllm.config import parse_config
from mmllm.errors import UserError
from mmllm.methods.m3col import M3CoL, mix_nce, mix_targets, mixed, soft_clip
from mmllm.train.align import AlignConfig, align
from tests.align.conftest import settings, world  # noqa: F401

PAIR = ["image", "text"]


def test_unmixed_is_infonce(make_batch, unit):
    batch = make_batch({"image": unit(5, 8), "text": unit(5, 8, seed=1)})  # its scale is 1 / 0.1
    expected = InfoNCE(PAIR)(batch)["loss"].mean()
    objective = M3CoL(PAIR, p=0, contrast_weight=1.0)
    torch.testing.assert_close(objective(batch)["loss"], 2 * expected)  # in both orders
    assert not torch.allclose(M3CoL(PAIR, p=1, alpha=5, contrast_weight=1.0)(batch)["loss"], 2 * expected)


def test_targets_sum_to_one_also_where_a_row_is_mixed_with_itself():
    share, partner = torch.tensor([0.3, 0.6, 1.0, 0.2]), torch.tensor([1, 1, 0, 0])
    target = mix_targets(share, partner)
    expected = torch.tensor([[0.3, 0.7, 0, 0], [0, 1.0, 0, 0], [0, 0, 1.0, 0], [0.8, 0, 0, 0.2]])
    torch.testing.assert_close(target, expected)


def test_half_shares_of_two_rows_have_floor_log_two():
    share, partner = torch.full((2,), 0.5), torch.tensor([1, 0])
    y = torch.eye(2)
    torch.testing.assert_close(mix_targets(share, partner), torch.full((2, 2), 0.5))
    x = mixed(y, share, partner)  # both rows are the middle of the two
    torch.testing.assert_close(mix_nce(x, y, share, partner, 0.1), torch.tensor(math.log(2)))
    assert mix_nce(y, y, share, partner, 0.1) > math.log(2)


def test_soft_clip_becomes_infonce(unit):
    x, y = unit(6, 8), torch.eye(6, 8)
    logits = x @ y.T / 0.2
    expected = (F.cross_entropy(logits, torch.arange(6)) + F.cross_entropy(logits.T, torch.arange(6))) / 2
    torch.testing.assert_close(soft_clip(x, y, 0.2, 1e-3), expected)
    assert not torch.allclose(soft_clip(x, y, 0.2, 1.0), expected)


def test_the_phase_changes_from_mixing_to_soft_clip(make_batch, unit):
    a, b = unit(5, 8), unit(5, 8, seed=1)
    batch = make_batch({"image": a, "text": b}, progress=0.5)
    soft = soft_clip(a, b, 0.125, 0.125) + soft_clip(b, a, 0.125, 0.125)
    torch.testing.assert_close(M3CoL(PAIR, contrast_weight=1.0)(batch)["loss"], soft)
    always = M3CoL(PAIR, contrast_weight=1.0, mix_share=1.0)
    batch.progress = 1.0
    assert not torch.allclose(always(batch)["loss"], soft)


def test_mixing_is_a_function_of_seed_and_step(make_batch, unit):
    batch = make_batch({"image": unit(5, 8), "text": unit(5, 8, seed=1)})
    objective = M3CoL(PAIR, p=1, alpha=2)
    first = objective(batch)["loss"]
    torch.randn(3)
    assert torch.equal(objective(batch)["loss"], first)
    batch.step = 1
    assert not torch.equal(objective(batch)["loss"], first)
    share, partner = objective.draw(4000, torch.Generator().manual_seed(0))
    assert float(share.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(share.var()) == pytest.approx(1 / (4 * (2 * 2 + 1)), abs=0.01)  # of Beta(2, 2)
    assert sorted(partner.tolist()) == list(range(4000))
    kept = M3CoL(PAIR, p=0.25, alpha=2).draw(4000, torch.Generator().manual_seed(0))[0] == 1
    assert float(kept.double().mean()) == pytest.approx(0.75, abs=0.03)


def model(dim=8):
    return type("Model", (), {"embedding_dim": dim})()


def test_classes_of_items_that_lack_a_stream(make_batch, unit):
    torch.manual_seed(0)
    objective = M3CoL(PAIR, classes=["x", "y"], contrast_weight=0.0)
    objective.setup(model())
    a, b = unit(3, 8), unit(2, 8, seed=1)
    batch = make_batch({"image": a, "text": b}, items=torch.arange(4), labels=["x", "y", "x", "other"])
    batch.streams["image"].owner, batch.streams["text"].owner = torch.tensor([0, 2, 3]), torch.tensor([1, 2])
    zero = torch.zeros(1, 8)
    image = F.cross_entropy(objective.single[0](a[:2]), torch.tensor([0, 0]))
    text = F.cross_entropy(objective.single[1](b), torch.tensor([1, 0]))
    joined = torch.cat([torch.cat([a[:1], zero], 1), torch.cat([zero, b[:1]], 1), torch.cat([a[1:2], b[1:2]], 1)])
    fused = F.cross_entropy(objective.fused(joined), torch.tensor([0, 1, 0]))
    torch.testing.assert_close(objective(batch)["loss"], image + text + fused)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"classes": ["a"]}, "classes must be"),
        ({"p": 2}, "p must be within"),
        ({"alpha": 0}, "alpha must be above 0"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(UserError, match=words):
        M3CoL(PAIR, **options)


def test_a_run_learns_the_classes(settings, tmp_path):  # noqa: F811
    both = settings["phases"]["both"]
    both |= {"sources": {"things": both["sources"]["things"]}, "trains": ["image.head", "text.head"]}
    both["train"] = {"max_steps": 40, "logging_steps": 40, "learning_rate": 1e-2}
    options = {"pair": PAIR, "field": "subgroup", "classes": ["square", "bar"]}
    both["objectives"] = [{"type": "m3col", "options": options}]
    measure = {"kind": "m3col_classes", "data": "things_val.jsonl", "streams": PAIR}
    settings |= {"phases": {"both": both}, "measures": {"c": measure}}
    out = align(parse_config(settings, AlignConfig), tmp_path / "run")
    found = {f["name"]: f["value"] for f in json.loads((out / "final" / "results.json").read_text())["figures"]}
    assert found["c_fused"] == 1.0 and set(found) == {"c_image", "c_text", "c_fused"}
