"""Objectives and samplers are shown the bank of their source before a phase's first step, and stay for the measures."""

from __future__ import annotations

import pytest
import torch

import mmllm.registry as registry
from mmllm.config import parse_config
from mmllm.contracts import Objective
from mmllm.data.samplers import KeyedSampler
from mmllm.report.figures import Figure
from mmllm.train.align import AlignConfig, align

SEEN: list = []


class Sized(Objective):
    """Counts how often each item came."""

    needs = frozenset({"image.embedding"})

    def prepare(self, bank):
        self.register_buffer("count", torch.zeros(len(bank.source.records), dtype=torch.long))
        SEEN.append(("objective", len(bank.items), bank.embedding("image")[0].shape))

    def forward(self, batch):
        if self.training:
            self.count[batch.items] += 1
        return {"loss": batch.streams["image"].embedding.square().sum(1)}


class ByFeature(KeyedSampler):
    """The items with the largest first feature."""

    order: torch.Tensor

    def prepare(self, bank):
        rows, items = bank.pooled("text")
        assert items.tolist() == bank.items.tolist() and len(rows) == self.size
        self.order = rows[:, 0].argsort(descending=True)

    def indices(self, step):
        return self.order[: self.batch_size].tolist()


def counted(stage, measure, records):
    return [Figure("counted", float(stage.steps["both"].objectives[0].count.sum()))]


@pytest.fixture(autouse=True)
def named(monkeypatch):
    SEEN.clear()
    for kind, name, thing in (("objective", "sized", Sized), ("batch_sampler", "by_feature", ByFeature)):
        monkeypatch.setitem(registry._REGISTRY.setdefault(kind, {}), name, thing)
    monkeypatch.setitem(registry._REGISTRY.setdefault("measure", {}), "counted", counted)


def test_prepare_and_measures_of_what_was_learned(settings, tmp_path):
    both = settings["phases"]["both"]
    both["sources"] = {"things": both["sources"]["things"] | {"sampler": "by_feature"}}
    both |= {"objectives": [{"type": "sized"}], "trains": ["image.head"], "train": {"max_steps": 4, "save_steps": 2}}
    settings |= {"phases": {"both": both}}
    settings["measures"] = {"counted": {"kind": "counted", "data": "things_val.jsonl", "streams": ["image"]}}
    out = align(parse_config(settings, AlignConfig), tmp_path / "run")
    assert SEEN == [("objective", 32, (32, 16))]
    assert '"value": 32.0' in (out / "final" / "results.json").read_text()  # four batches of eight
