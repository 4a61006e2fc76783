"""The planner of packed rows: full rows, nothing lost, the same plan whoever asks; and the batches that follow it."""

import itertools
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_mm import tiny_llm, tiny_towers

from mmllm.data import packing
from mmllm.data.conversations import IGNORE
from mmllm.data.mixtures import Mixture
from mmllm.data.packing import PackedBatches, fill_best, fill_rate, plan_rows
from mmllm.model import build_model


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.lists(st.integers(1, 130), min_size=1, max_size=80))
def test_every_item_is_in_one_row_and_no_row_is_too_long(lengths):
    rows = plan_rows(lengths, 100)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    used = [sum(lengths[i] for i in row) for row in rows]
    assert all(u <= 100 or len(row) == 1 for u, row in zip(used, rows))
    half_empty = [u for u in used if u <= 50]
    assert len(half_empty) <= 1, "two of them would have shared a row"


def test_a_known_plan_and_its_fill():
    lengths = [5, 7, 3, 5, 10, 2, 8]
    rows = plan_rows(lengths, 10)
    assert [sorted(r) for r in rows] == [[4], [5, 6], [1, 2], [0, 3]] and fill_rate(rows, lengths, 10) == 1.0


def mixed(n, seed=0):
    """Conversations of the issue's mix: text alone, one picture of 64 tokens, five tiles, four pictures."""
    rng = random.Random(seed)
    pictures = rng.choices([0, 64, 5 * 64, 4 * 64], [0.2, 0.6, 0.15, 0.05], k=n)
    return [p + rng.randint(20, 200) for p in pictures]


@given(st.lists(st.integers(1, 30), max_size=9), st.integers(-3, 80))
def test_a_rest_is_filled_as_well_as_any_choice_of_items_can(lengths, room):
    taken = fill_best(lengths, room)
    assert len(set(taken)) == len(taken)
    sums = {sum(c) for n in range(len(lengths) + 1) for c in itertools.combinations(lengths, n)}
    assert sum(lengths[i] for i in taken) == max((s for s in sums if s <= room), default=0)


def test_conversations_of_like_length_need_no_row_more_than_their_tokens_do():
    """None is short enough to fill the gaps that the others leave: only the right sets fill their rows."""
    rng = np.random.default_rng(0)
    pictures = rng.choice([0, 1, 5, 4], 2048, p=[0.2, 0.6, 0.15, 0.05])
    lengths = (rng.choice([90, 117, 118, 119, 130, 150, 160], 2048) + 64 * pictures).tolist()
    assert len(plan_rows(lengths, 2048)) == math.ceil(sum(lengths) / 2048)


def test_rows_of_a_mixture_are_99_percent_full():
    lengths = mixed(2000)
    assert fill_rate(plan_rows(lengths, 2048), lengths, 2048) >= 0.99


# ---- batches ---------------------------------------------------------------------------------------------------------


def turn(role, text):
    return {"role": role, "content": [{"type": "text", "text": text}]}


@pytest.fixture(scope="module")
def processor():
    return build_model(tiny_llm(), *tiny_towers(), dtype=torch.float32)[1]


@pytest.fixture(scope="module")
def records():
    rng = random.Random(0)
    out = []
    for i in range(60):
        branches = [[turn("user", f"{k}?"), turn("assistant", "yes" * rng.randint(1, 4))] for k in range(i % 4)]
        start = [turn("user", "x" * rng.randint(1, 60))]
        record = {"id": str(i), "messages": start, "branches": branches}
        out.append(record if branches else {"id": str(i), "messages": [*start, turn("assistant", "no")]})
    return out


@pytest.fixture
def make(processor, records, monkeypatch):
    monkeypatch.setattr(packing, "POOL", 25)

    def batches(**options):
        options = {"batch_size": 2, "seed": 7, "branches_per_row": 2, "max_length": 90, "row_length": 120} | options
        return PackedBatches(records, processor, lambda media: {}, len, **options)

    return batches


def test_batches_are_pure_and_every_record_comes_once_an_epoch(make):
    a, b = make(), make()
    for step in (7, 2, 11):  # any order, any object: the same batch
        for key, value in a(step).items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(b(step)[key])), key
    c = make()
    end = c.rows_an_epoch()
    c.packed_rows(end)  # two rows a batch: well into the second epoch
    first = [d for row in c._rows[:end] for d in row]
    assert sorted(first) == [(0, i) for i in range(60)] and c._rows[end][0][0] == 1
    assert c._rows[:end] == make(batch_size=5).packed_rows(0)[:end] + c._rows[5:end]
    two = [row for rank in (0, 1) for row in make().packed_rows(3 * 2 + rank)]
    assert two == make(batch_size=4).packed_rows(3)


def test_what_a_mixture_puts_first_is_packed_first(make):
    mixture = Mixture([40, 20], [1, 1], 0, [0, 18])
    batches = make(mixture=mixture)
    end = batches.rows_an_epoch()
    documents = [i for row in batches._rows[:end] for _, i in row]
    assert sorted(documents) == sorted(mixture.epoch(0)) and min(documents[:6]) >= 40  # emptiest rows wait
    plain = make(mixture=Mixture([40, 20], [1, 1], 0))
    early = [i for row in plain._rows[: plain.rows_an_epoch()] for _, i in row][:18]
    assert sum(i >= 40 for i in documents[:18]) > sum(i >= 40 for i in early) + 2


def test_counted_lengths_are_those_of_the_batches(make):
    batches = make()
    for step in range(8):
        rows, batch = batches.packed_rows(step), batches(step)
        counts = torch.bincount(batch["document_ids"][0]).tolist()
        assert counts == [batches.length(e, i) for row in rows for e, i in row]
        assert all(sum(batches.length(e, i) for e, i in row) <= 120 for row in rows)
        assert batch["num_items"] == int((batch["labels"][:, 1:] != IGNORE).sum())
        assert {len(v[0]) for k, v in batch.items() if isinstance(v, torch.Tensor)} == {sum(counts)}
    assert 0.9 < batches.fill <= 1
    assert make(max_length=80, row_length=80)(0)["document_ids"].shape[1] <= 160


def test_branches_are_drawn_anew_in_each_epoch(make):
    batches = make(branches_per_row=1)
    seen = {tuple(batches.choose(epoch, 3)) for epoch in range(12)}
    assert seen == {(0,), (1,), (2,)}


def test_answers_of_different_documents_weigh_apart(make):
    batch = make(length_normalization=1.0)(0)
    asked = batch["labels"] != IGNORE
    answers = int((asked[0, 1:] & ~asked[0, :-1]).sum())
    np.testing.assert_allclose(batch["num_items"], answers, rtol=1e-5)
