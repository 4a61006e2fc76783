"""Symile's oracles: the catalogue's entry 11."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F

from mmllm.align.objectives import InfoNCE
from mmllm.config import parse_config
from mmllm.errors import UserError
from mmllm.methods.symile import Symile
from mmllm.train.align import align
from mmllm.train.align_config import AlignConfig
from tests.align.conftest import settings, world  # noqa: F401

THREE = ["image", "text", "audio"]


def run(rows, make_batch, step=0, owners=None, **options):
    torch.manual_seed(0)
    objective = Symile(list(rows), scale=10.0, **options)

    class Model:
        embedding_dim = next(iter(rows.values())).shape[1]

    objective.setup(Model)
    batch = make_batch(rows, ids=list("abcdefgh")[: max(len(r) for r in rows.values())], step=step)
    for name, owner in (owners or {}).items():
        batch.streams[name].owner = torch.tensor(owner)
    return objective, objective(batch)


@pytest.fixture
def three(unit):
    return {s: unit(5, 8, seed=k) for k, s in enumerate(THREE)}


def test_two_streams_are_infonce(make_batch, three):
    two = {s: three[s] for s in THREE[:2]}
    expected = InfoNCE(THREE[:2])(make_batch(two))["loss"]
    for negatives in ("all", "shuffled"):
        got = run(two, make_batch, negatives=negatives)[1]["loss"]
        assert torch.allclose(got, expected) == (negatives == "all")  # shuffled columns may hold the own row again


def test_equals_the_formula_with_all_combinations(make_batch, three):
    loss = run(three, make_batch, negatives="all")[1]["loss"]
    expected = torch.zeros(5)
    for anchor in THREE:
        a, (y, z) = three[anchor], [three[s] for s in THREE if s != anchor]
        logits = 10 * torch.einsum("id,jd,kd->ijk", a, y, z)
        expected += torch.stack([logits[i].logsumexp((0, 1)) - logits[i, i, i] for i in range(5)]) / 3
    torch.testing.assert_close(loss, expected)


def test_shuffled_negatives_are_other_rows_and_the_own_tuple_is_the_positive(make_batch, three):
    loss = run(three, make_batch, step=4)[1]["loss"]
    generator = torch.Generator().manual_seed(4)
    expected = torch.zeros(5)
    for anchor in THREE:
        a, (y, z) = three[anchor], [three[s] for s in THREE if s != anchor]
        p, q = (torch.randperm(5, generator=generator) for _ in range(2))
        for i in range(5):
            logits = torch.stack([10 * (a[i] * (y[i] * z[i] if i == j else y[p[j]] * z[q[j]])).sum() for j in range(5)])
            expected[i] += (logits.logsumexp(0) - logits[i]) / 3
    torch.testing.assert_close(loss, expected)
    assert not torch.allclose(run(three, make_batch, step=5)[1]["loss"], loss)


def test_a_stream_of_ones_adds_the_logarithm_of_the_batch(make_batch, three):
    rows = {"image": three["image"], "text": three["text"], "ones": torch.ones(5, 8)}
    got = run(rows, make_batch, negatives="all")[1]["loss"]
    logits = 10 * three["image"] @ three["text"].T
    pairs = [F.cross_entropy(x, torch.arange(5), reduction="none") for x in (logits, logits.T)]
    # With the ones as anchor the candidates are all pairs.
    third = logits.flatten().logsumexp(0) - logits.diagonal()
    torch.testing.assert_close(got, (pairs[0] + pairs[1] + 2 * math.log(5) + third) / 3)


def test_invariances(make_batch, three):
    loss = run(three, make_batch, negatives="all")[1]["loss"]
    turned = {s: three[s] for s in reversed(THREE)}
    torch.testing.assert_close(run(turned, make_batch, negatives="all")[1]["loss"], loss)
    sign = torch.ones(8)
    sign[3] = -1
    flipped = three | {s: three[s] * sign for s in ("text", "audio")}
    torch.testing.assert_close(run(flipped, make_batch)[1]["loss"], run(three, make_batch)[1]["loss"])


def test_items_that_lack_a_stream(make_batch, three):
    owners = {"audio": [0, 2, 3, 4]}
    rows = three | {"audio": three["audio"][[0, 2, 3, 4]]}
    out = run(rows, make_batch, owners=owners, negatives="all")[1]
    assert out["valid"].tolist() == [True, False, True, True, True]
    whole = run({s: r[[0, 2, 3, 4]] for s, r in three.items()}, make_batch, negatives="all")[1]["loss"]
    torch.testing.assert_close(out["loss"][out["valid"]], whole)

    objective, out = run(rows, make_batch, owners=owners, placeholder=True)
    assert out["valid"].all()
    stand_in = F.normalize(objective.missing[2].detach(), dim=-1)
    filled = three | {"audio": torch.cat([three["audio"][:1], stand_in[None], three["audio"][2:]])}
    plain = run(filled, make_batch)[1]["loss"]
    torch.testing.assert_close(out["loss"][[0, 2, 3, 4]], plain[[0, 2, 3, 4]])
    assert not torch.allclose(out["loss"][1], plain[1])  # what it lacks is no anchor
    out["loss"].sum().backward()
    assert objective.missing[2].grad.abs().sum() > 0


def test_mistakes_are_named(make_batch, three):
    with pytest.raises(UserError, match="two or more"):
        Symile(["image", "image"])
    with pytest.raises(UserError, match="negatives"):
        Symile(THREE, negatives="some")
    with pytest.raises(UserError, match="scale"):
        Symile(THREE, scale=0)
    with pytest.raises(UserError, match="several rows"):
        run(three, make_batch, owners={"text": [0, 0, 1, 2, 3]})


def test_a_run_on_exclusive_or(settings, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("MMLLM_CACHE", str(tmp_path / "cache"))
    labels = ["black bar", "black square", "blue bar", "blue square"]
    xor = {"type": "exclusive_or", "bits": 2, "count": 24, "labels": labels}
    tower = settings["streams"]["image"]["tower"]
    settings["streams"]["clip"] = {"modality": "video", "tower": tower, "head": {}}
    streams = ["image", "text", "clip"]
    both = settings["phases"]["both"]
    both["sources"] = {"triples": {"data": "things_train.jsonl", "recipes": [xor], "streams": streams}}
    both["objectives"] = [{"type": "symile", "options": {"streams": streams}}]
    both |= {"trains": [f"{s}.head" for s in streams], "train": {"max_steps": 3, "logging_steps": 1}}
    settings["phases"] = {"both": both}
    about = {"kind": "from_the_others", "data": "things_val.jsonl", "streams": streams, "recipes": [xor], "by": "label"}
    settings["measures"] = {"xor": about, "added": about | {"options": {"combine": "sum"}}}
    out = align(parse_config(settings, AlignConfig), tmp_path / "run")
    figures = {f["name"]: f for f in json.loads((out / "final" / "results.json").read_text())["figures"]}
    assert 0 <= figures["xor_r1"]["value"] <= 1 and 0.15 < figures["added_r1"]["chance"] < 0.4
    assert "symile_scale" in (out / "metrics.jsonl").read_text()
