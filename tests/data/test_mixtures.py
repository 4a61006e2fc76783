"""Mixtures: shares are kept, all records of a source come equally often, and the order follows from the seed."""

from collections import Counter

import numpy as np
import pytest

from mmllm.data.mixtures import Mixture, shares
from mmllm.errors import UserError


@pytest.mark.parametrize(
    ("total", "weights", "wanted"),
    [(100, [0.5, 0.3, 0.2], [50, 30, 20]), (10, [1, 1, 1], [4, 3, 3]), (7, [2, 1], [5, 2]), (50, [1, 1e-6], [49, 1])],
)
def test_shares_by_largest_remainders(total, weights, wanted):
    assert shares(total, weights) == wanted


def test_shares_always_add_up():
    rng = np.random.default_rng(0)
    for _ in range(300):
        weights = rng.uniform(1e-4, 1, int(rng.integers(1, 9)))
        total = int(rng.integers(len(weights), 500))
        counts = shares(total, weights)
        assert sum(counts) == total and min(counts) >= 1
        exact = weights * total / weights.sum()
        assert all(abs(c - e) <= len(weights) for c, e in zip(counts, exact))


def test_every_epoch_has_the_shares_and_all_records_come_equally_often():
    sizes, weights = [30, 8, 2], [0.25, 0.25, 0.5]
    mixture = Mixture(sizes, weights, seed=3)
    seen = Counter()
    for epoch in range(7):
        drawn = mixture.epoch(epoch)
        source = np.searchsorted([30, 38, 40], drawn, side="right")
        assert np.bincount(source).tolist() == [10, 10, 20] and len(drawn) == len(mixture) == 40
        seen.update(drawn.tolist())
        for start, stop in ((0, 30), (30, 38), (38, 40)):
            times = [seen[n] for n in range(start, stop)]
            assert max(times) - min(times) <= 1, "a source goes on where the epoch before ended"


def test_the_order_is_a_function_of_seed_and_epoch():
    make = lambda seed=3: Mixture([30, 8], [1, 1], seed)  # noqa: E731
    assert np.array_equal(make().epoch(5), make().epoch(5))
    assert not np.array_equal(make().epoch(5), make().epoch(4))
    assert not np.array_equal(make().epoch(5), make(4).epoch(5))
    first = make().epoch(0)
    assert len({tuple(first < 30)}) == 1 and not (np.diff((first < 30).astype(int)) == 0).all(), "sources are mixed"


def test_what_comes_first_is_at_the_front_of_the_first_epoch_alone():
    plain, mixture = Mixture([30, 8, 2], [2, 1, 1], 3), Mixture([30, 8, 2], [2, 1, 1], 3, [0, 6, 99])
    first = mixture.epoch(0)
    assert mixture.opening == 16 and sorted(first) == sorted(plain.epoch(0))
    source = np.searchsorted([30, 38], first, side="right")
    assert np.bincount(source[:16], minlength=3).tolist() == [0, 6, 10] and len(set(source[16:])) == 2
    assert np.array_equal(mixture.epoch(1), plain.epoch(1))


def test_a_source_without_records_is_refused():
    with pytest.raises(UserError, match="data.1"):
        Mixture([3, 0], [1, 1], 0)
