"""MCL's oracles: the catalogue's entry 24."""

from __future__ import annotations

import json
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from mmllm.config import parse_config
from mmllm.data.samplers import OneCluster
from mmllm.errors import UserError
from mmllm.methods.mcl import ComplementaryStage, composite, joined
from mmllm.train.align import AlignConfig, align
from tests.align.conftest import settings, world  # noqa: F401

PAIR = ["image", "text"]


class Bank:
    """Embeddings of items 1..N, as item 0 cannot be read."""

    def __init__(self, rows, active=()):
        self.rows = rows
        self.items = torch.arange(1, 1 + len(next(iter(rows.values()))))
        self.source = SimpleNamespace(records=[None] * (1 + len(self.items)), name="things", streams=list(rows))
        names = {s: s for s in rows}
        self.step = SimpleNamespace(
            model=SimpleNamespace(tower_of=names, base=lambda s: s, owner=lambda s, kind: s, active=set(active))
        )

    def embedding(self, stream):
        return self.rows[stream], self.items


def made(rows, batch=4, seed=(0, 3), k=3, active=(), streams=None):
    streams = list(rows) if streams is None else streams
    sampler = ComplementaryStage(["x"] * len(rows["a"]), batch, seed, streams=streams, k=k)
    sampler.prepare(Bank(rows, active))
    return sampler


def key_of_item(sampler):
    return {i: key for key, items in sampler.members.items() for i in items}


def test_one_composite_cluster_for_each_batch_and_stages_only_refine(unit):
    a, b = unit(80, 6), unit(80, 6, seed=1)
    first, second = made({"a": a}), made({"a": a, "b": b}, seed=(0, 19))
    one, two = key_of_item(first), key_of_item(second)
    assert len(first.names) == 3 and len(second.names) > 3
    for step in range(30):
        batch = second.indices(step)
        assert len(batch) == len(set(batch)) == 4 and len({two[i] for i in batch}) == 1
    assert all(one[i] == one[j] for i in range(80) for j in range(80) if two[i] == two[j])
    assert all(two[i][:1] == one[i] for i in range(80))  # another phase's seed finds the same clusters


def test_one_cluster_is_plain_random_batches(unit):
    plain = OneCluster(["x"] * 18, 4, (0, 3))
    for sampler in (made({"a": unit(18, 4)}, k=1), made({"a": unit(18, 4)}, streams=[])):
        seen = [sampler.indices(step) for step in range(8)]
        for epoch in (seen[:4], seen[4:]):
            assert Counter(i for batch in epoch for i in batch).most_common(1)[0][1] == 1
            assert sum(map(len, epoch)) == 16  # 18 items up to the remainder
        assert [sorted(b) for b in seen] == [sorted(plain.indices(step)) for step in range(8)]


def test_cosine_of_joined_rows_is_the_mean_cosine(unit):
    parts = [(unit(5, 6, seed=s), unit(5, 6, seed=s + 9)) for s in range(3)]
    a, b = joined([3 * x for x, _ in parts]), joined([y for _, y in parts])
    torch.testing.assert_close(a @ b.T, sum(x @ y.T for x, y in parts) / 3)
    torch.testing.assert_close(a.norm(dim=1), torch.ones(5))


def test_composite_keys():
    assert composite([torch.tensor([0, 1, 1]), torch.tensor([2, 0, 2])], 3) == [(0, 2), (1, 0), (1, 2)]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"streams": ["b"]}, "does not feed stream 'b'"),
        ({"active": ["a.head"]}, "'a.head' trains in this phase"),
        ({"k": 0}, "k must be at least 1"),
        ({"k": 19}, "cannot be put into 19 clusters"),
        ({"k": 9, "batch": 8}, "no cluster fills a batch"),
    ],
)
def test_mistakes(unit, more, words):
    with pytest.raises(UserError, match=words):
        made({"a": unit(18, 4)}, **more)


def test_two_stages_in_a_run(settings, tmp_path):  # noqa: F811
    for name in PAIR:
        held = settings["streams"][name]
        settings["streams"][f"{name}_2"] = {"tower_of": name, **{k: held[k] for k in ("modality", "head")}}
    things = settings["phases"]["both"]["sources"]["things"]
    things |= {"streams": [*PAIR, "image_2", "text_2"], "batch_size": 4}
    phases = {}
    for number, pair in enumerate((PAIR, ["image_2", "text_2"])):
        sampler = {"type": "mcl", "options": {"streams": ["image"][:number], "k": 2}}
        phases[f"stage_{number}"] = {
            "sources": {"things": things | {"sampler": sampler}},
            "objectives": [{"type": "infonce", "options": {"pair": pair}}],
            "trains": [f"{s}.head" for s in pair],
            "train": {"max_steps": 6, "logging_steps": 6},
        }
    about = {"data": "things_val.jsonl", "field": "subgroup", "train": "things_train.jsonl"}
    sides = {"sides": {"image": ["image", "image_2"], "text": ["text", "text_2"]}}
    settings["measures"] = {
        "probe": {"kind": "joined_probe", "streams": ["image", "image_2"], **about},
        "found": {"kind": "joined_pairs", "streams": PAIR, "data": "things_val.jsonl", "options": sides},
    }
    out = align(parse_config(settings | {"phases": phases}, AlignConfig), tmp_path / "run")
    found = {f["name"]: f["value"] for f in json.loads((out / "final" / "results.json").read_text())["figures"]}
    assert 0 <= found["probe_linear"] <= 1 and 0 <= found["found_image_to_text_r1"] <= 1
