"""Batch samplers: what each promises about a batch, exact epochs, and the same batch for the same seed and step."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from mmllm.data.samplers import KeyedSampler
from mmllm.errors import UserError
from mmllm.registry import get, names

# 40 items of 8 keys, unevenly: key k has k + 1 items (and the last one four more).
KEYS = [k for k in range(8) for _ in range(k + 1)] + [7] * 4
OPTIONS = {"k_per_group": {"k": 2}, "label_window": {"window": 1}, "one_cluster": {}}


def make(name, batch_size=4, seed=0, keys=KEYS, **options):
    return get("batch_sampler", name)(keys, batch_size, seed, **{**OPTIONS.get(name, {}), **options})


@pytest.mark.parametrize("name", names("batch_sampler"))
def test_a_batch_depends_on_seed_and_step_alone(name):
    one, other = make(name), make(name)
    forth = [one.indices(s) for s in range(12)]
    back = [other.indices(s) for s in reversed(range(12))][::-1]
    assert forth == back and len({tuple(b) for b in forth}) > 6
    assert [make(name, seed=(0, 1)).indices(s) for s in range(12)] != forth
    for batch in forth:
        assert len(batch) == 4 and all(isinstance(i, int) and 0 <= i < len(KEYS) for i in batch)
    assert isinstance(one, KeyedSampler)


def test_random_and_distinct():
    assert all(len(set(make("random").indices(s))) == 4 for s in range(20))
    assert len(make("random", 50).indices(0)) == 50
    for s in range(20):
        assert len({KEYS[i] for i in make("distinct").indices(s)}) == 4
    assert sorted(KEYS[i] for i in make("distinct", 100).indices(3)) == list(range(8))


def test_shuffle_shows_every_item_once_an_epoch_across_batches_that_straddle_epochs():
    sampler = make("shuffle", 7)
    stream = [i for s in range(40) for i in sampler.indices(s)]
    epochs = [stream[e : e + 40] for e in range(0, 280, 40)]
    assert all(sorted(e) == list(range(40)) for e in epochs) and epochs[0] != epochs[1]


def test_k_per_group():
    for s in range(30):
        batch = make("k_per_group", 8).indices(s)
        assert set(Counter(KEYS[i] for i in batch).values()) == {2}
        # Only the key with a single item may show it twice.
        assert all(n == 1 or KEYS[i] == 0 for i, n in Counter(batch).items())
    with pytest.raises(UserError, match="no multiple of k = 3"):
        make("k_per_group", 8, k=3)
    with pytest.raises(UserError, match="needs 20 groups, and there are 8"):
        make("k_per_group", 40)


def test_balanced_counts_differ_by_one_at_most_and_even_out():
    total = Counter()
    for s in range(400):
        counts = Counter(KEYS[i] for i in make("balanced", 12).indices(s))
        assert len(counts) == 8 and max(counts.values()) - min(counts.values()) <= 1
        total += counts
    assert max(total.values()) / min(total.values()) < 1.1  # though the largest key has twelve times as many items


def test_one_cluster_batches_are_pure_and_no_item_comes_twice_an_epoch():
    sampler = make("one_cluster")
    per_epoch = sum(n // 4 for n in Counter(KEYS).values())
    for epoch in range(3):
        batches = [sampler.indices(s) for s in range(epoch * per_epoch, (epoch + 1) * per_epoch)]
        assert all(len({KEYS[i] for i in b}) == 1 for b in batches)
        seen = [i for b in batches for i in b]
        assert len(seen) == len(set(seen)) == 4 * per_epoch
    whole = get("batch_sampler", "one_cluster")(["c"] * 12, 4, 0)
    assert sorted(i for s in range(3) for i in whole.indices(s)) == list(range(12))
    with pytest.raises(UserError, match="the largest has 12 items"):
        make("one_cluster", 13)


def test_label_window():
    values = np.random.default_rng(0).uniform(0, 100, 200)
    sampler = get("batch_sampler", "label_window")(values.tolist(), 8, 3, window=10)
    anchors = set()
    for s in range(50):
        batch = sampler.indices(s)
        assert len(set(batch)) == 8 and np.ptp(values[batch]) <= 20
        anchors.add(round(values[batch].mean() / 20))
    assert len(anchors) >= 4
    far = get("batch_sampler", "label_window")([0, 1, 2, 100, 101, 102], 3, 0, window=0)
    assert {tuple(sorted(far.indices(s))) for s in range(40)} == {(0, 1, 2), (3, 4, 5)}
    with pytest.raises(UserError, match="must be numbers"):
        make("label_window", keys=["a", "b", "c", "d", "e"])
    with pytest.raises(UserError, match="larger than the 40 items"):
        make("label_window", 41)


def test_unknown_sampler_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'balanced'"):
        get("batch_sampler", "balance")
