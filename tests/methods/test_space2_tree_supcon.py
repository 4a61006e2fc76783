"""SPACE-2's oracles: the catalogue's entry 66."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from mmllm.config import parse_config
from mmllm.errors import UserError
from mmllm.methods.space2_tree_supcon import TreeSupCon, soft_supcon, spans, tree_scores
from mmllm.train.align import AlignConfig, align
from tests.align.conftest import settings, world  # noqa: F401


def views(count, unit):
    return unit(1, 2 * count, 6)


def test_own_view_alone_is_nt_xent(unit):
    z = views(4, unit)
    scores = torch.eye(4).repeat(2, 2)[None]
    found = soft_supcon(z, scores, 0.07)[0]
    logits = (z[0] @ z[0].T / 0.07).masked_fill(torch.eye(8, dtype=torch.bool), -torch.inf)
    torch.testing.assert_close(found, F.cross_entropy(logits, torch.arange(8).roll(4), reduction="none"))


def test_classes_are_supcon_and_the_scale_of_scores_does_not_matter(unit):
    z, label = views(4, unit), torch.tensor([0, 0, 1, 2]).repeat(2)
    scores = (label[:, None] == label).float()[None]
    found = soft_supcon(z, scores, 0.5)[0]
    for i in range(8):
        others = [a for a in range(8) if a != i]
        logits = z[0, i] @ z[0].T / 0.5
        hits = [logits[others].logsumexp(0) - logits[p] for p in others if label[p] == label[i]]
        torch.testing.assert_close(found[i], torch.stack(hits).mean())
    torch.testing.assert_close(soft_supcon(z, 0.3 * scores, 0.5)[0], found)


def test_equal_features_give_the_log_of_the_others(unit):
    scores = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    found = soft_supcon(torch.ones(3, 8, 5), scores, 0.07)
    torch.testing.assert_close(found, torch.full((3, 8), math.log(7)))


def test_a_tree_of_depth_four_has_ten_parts():
    assert len(spans(4)) == 10 and spans(4)[:5] == [(0, 1), (1, 2), (2, 3), (3, 4), (0, 2)] and spans(4)[-1] == (0, 4)
    a, same, domain = ["d", "i", "s", "v"], ["d", "i", "s", "v"], ["d", "x", "y", "z"]
    scores = tree_scores([[a], [same], [domain], [], [["d", "i", None, None]]], 4)
    torch.testing.assert_close(scores[:, 0, 1], torch.ones(10))
    assert scores[0, 0, 2] == 1 and scores[-1, 0, 2] == 0 and scores[1:, 0, 2].sum() == 0
    assert scores[:, 0, 3].sum() == scores[:, 3, 3].sum() == 0  # without a tree
    assert scores[4, 0, 4] == 1 and scores[5:, 0, 4].sum() == 0  # no slot: the edge domain-intent alone


def test_several_branches_share_a_part_of_their_union():
    scores = tree_scores([[["d", "a"], ["d", "b"]], [["d", "b"], ["d", "c"]]], 2)
    torch.testing.assert_close(scores[:, 0, 1], torch.tensor([1.0, 1 / 3, 1 / 3]))  # level, level, path


def objective(**options):
    made = TreeSupCon(["image", "text"], **options)
    torch.manual_seed(0)
    made.setup(SimpleNamespace(embedding_dim=6))
    return made


def test_each_part_has_its_own_subspace(make_batch, unit):
    rows = {"image": unit(3, 6), "text": unit(3, 6, seed=1)}
    meta = [{"kind": "a"}, {"kind": "a"}, {"kind": "b"}]
    batch = make_batch(rows, ids=["1", "2", "3"], labels=["x", "y", "z"], extras={"meta": meta})
    made = objective(fields=["meta.kind", "label"])
    z = torch.tanh(made.head(torch.cat(list(rows.values()))))
    kind = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1.0]]).repeat(2, 2)
    own = torch.eye(3).repeat(2, 2)
    expected = sum(soft_supcon(z[None, :, 6 * k : 6 * k + 6], s[None], 0.07)[0] for k, s in enumerate([kind, own, own]))
    out = made(batch)
    torch.testing.assert_close(out["loss"], (expected[:3] + expected[3:]) / 6)
    assert out["valid"].all()
    tree = [{"tree": [[m["kind"], x]]} for m, x in zip(meta, "xyz")]
    again = objective(tree="tree", depth=2)(make_batch(rows, extras={"meta": tree}))
    torch.testing.assert_close(again["loss"], out["loss"])


def test_a_missing_view_leaves_the_others(make_batch, unit):
    rows = {"image": unit(3, 6), "text": unit(2, 6, seed=1)}
    batch = make_batch(rows, ids=["1", "2", "3"], labels=["x", "x", "z"])
    batch.streams["text"].owner = torch.tensor([2, 0])
    out = objective(fields=["label"])(batch)
    assert out["valid"].all() and out["loss"].isfinite().all()
    out["loss"].sum().backward()


def test_mistakes_are_named():
    with pytest.raises(UserError, match="did you mean 'label'"):
        TreeSupCon(["image"], fields=["lable"])
    with pytest.raises(UserError, match="either fields or tree"):
        TreeSupCon(["image"])


def test_a_run_by_the_cards_line(settings, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("MMLLM_CACHE", str(tmp_path / "cache"))
    fields = ["meta.subgroup", "label"]
    settings["phases"] = {
        "one": {
            "sources": {"things": {"data": "things_train.jsonl", "streams": ["image"], "augment": "cutout"}},
            "objectives": [{"type": "tree_supcon", "options": {"streams": ["image"], "fields": fields}}],
            "trains": ["image.tower", "image.head"],
            "train": {"max_steps": 3},
        }
    }
    settings["measures"] = {
        "order": {
            "kind": "tree_order", "data": "things_val.jsonl", "streams": ["image"], "options": {"fields": fields},
        }
    }  # fmt: skip
    align(parse_config(settings, AlignConfig), tmp_path / "run")
    figures = {f["name"]: f for f in json.loads(next(tmp_path.rglob("results.json")).read_text())["figures"]}
    assert -1 <= figures["order"]["value"] <= 1
