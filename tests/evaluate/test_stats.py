"""Statistics against closed forms and slow references."""

import numpy as np
import pytest

from mmllm.evaluate import stats
from mmllm.evaluate.stats import auc, auc_interval, best_threshold, derangement, mean_interval, ratio_interval


def test_auc_equals_the_pairwise_definition_with_ties():
    rng = np.random.default_rng(0)
    scores, labels = rng.integers(0, 6, 60).astype(float), rng.random(60) < 0.4
    p, n = scores[labels][:, None], scores[~labels][None]
    assert auc(scores, labels) == pytest.approx(((p > n) + 0.5 * (p == n)).mean())


def test_auc_ignores_an_offset_and_flips_with_the_sign():
    scores, labels = np.array([0.1, 0.4, 0.35, 0.8]), np.array([0, 0, 1, 1], bool)
    assert auc(scores, labels) == pytest.approx(0.75)
    assert auc(scores + 100, labels) == pytest.approx(0.75) and auc(-scores, labels) == pytest.approx(0.25)
    assert np.isnan(auc(scores, np.ones(4, bool)))


def test_interval_matches_the_normal_approximation_and_brackets_the_mean():
    values = np.r_[np.ones(600), np.zeros(400)]
    mean, low, high = mean_interval(values)
    half = 1.96 * np.sqrt(0.24 / 1000)
    assert (
        mean == pytest.approx(0.6)
        and low == pytest.approx(0.6 - half, abs=0.004)
        and high == pytest.approx(0.6 + half, abs=0.004)
    )


def test_copies_inside_a_cluster_do_not_narrow_the_interval():
    values = np.random.default_rng(1).random(100)
    once = mean_interval(values, np.arange(100))
    copied = mean_interval(np.repeat(values, 6), np.repeat(np.arange(100), 6))
    naive = mean_interval(np.repeat(values, 6))
    assert copied == pytest.approx(once)
    assert naive[2] - naive[1] < 0.6 * (copied[2] - copied[1])


def test_ratio_is_pooled_and_empty_input_gives_nan():
    value, low, high = ratio_interval([1, 0, 2], [2, 1, 2])
    assert value == pytest.approx(3 / 5) and low <= value <= high
    assert all(np.isnan(ratio_interval([], []))) and all(np.isnan(ratio_interval([0, 0], [0, 0])))


def test_auc_interval_brackets_the_value():
    rng = np.random.default_rng(2)
    labels = rng.random(300) < 0.5
    value, low, high = auc_interval(rng.normal(size=300) + labels, labels, np.arange(300) // 3)
    assert low < value < high and 0.6 < low and high < 0.9


@pytest.mark.parametrize("n", [2, 3, 10, 101])
def test_derangement_is_a_permutation_without_fixed_points(n):
    p = derangement(n, seed=5)
    assert sorted(p) == list(range(n)) and all(i != t for i, t in enumerate(p)) and p == derangement(n, seed=5)


def test_derangement_avoids_the_own_group_when_it_can():
    groups = ["a", "b", "c", "d"] * 5
    p = derangement(20, 0, groups)
    clashes = sum(groups[i] == groups[t] for i, t in enumerate(p))
    assert clashes <= 2 and derangement(1, 0) == [0] and derangement(0, 0) == []


def test_threshold_separates_and_lies_in_the_gap():
    margins, labels = np.array([-3.0, -2.0, -1.0, 2.0]), np.array([0, 0, 1, 1], bool)
    assert best_threshold(margins, labels) == pytest.approx(-1.5)
    assert best_threshold(np.array([1.0, 2.0]), np.array([True, True])) < 1.0
    assert best_threshold([], []) == 0.0


def test_threshold_is_the_best_of_all():
    rng = np.random.default_rng(3)
    labels = rng.random(80) < 0.5
    margins = np.round(rng.normal(size=80) + labels, 1)
    t = best_threshold(margins, labels)
    best = max(((margins > c) == labels).mean() for c in np.r_[-9, np.unique(margins)])
    assert ((margins > t) == labels).mean() == pytest.approx(best)


def test_sums_in_portions_are_those_of_all_resamples_at_once(monkeypatch):
    rng = np.random.default_rng(2)
    clusters, columns = rng.integers(0, 9, 40), [rng.random(40), np.ones(40)]
    ids, draws = stats.resampled_weights(clusters, 40, 50, 3)
    whole = np.stack([draws @ np.bincount(ids, c) for c in columns], 1)
    monkeypatch.setattr(stats, "PORTION", 60)
    assert np.allclose(stats.resampled_sums(clusters, columns, 50, 3), whole)
