"""Paired statistics against closed forms, scipy, brute force, and simulated data whose truth is known."""

import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from scipy import stats as reference

from mmllm.evaluate import stats
from mmllm.evaluate.paired import (
    Comparison,
    accuracy_difference,
    auc_difference,
    compare_aucs,
    compare_rows,
    hierarchical_difference,
    holm,
    holm_adjusted,
    mcnemar,
    mcnemar_exact,
    paired_t,
    sign_flip_test,
)
from mmllm.evaluate.stats import auc, resampled_weights


def hits(rng, n, a, b):
    return (rng.random(n) < a).astype(float), (rng.random(n) < b).astype(float)


def yes_no(rng, n, clusters):
    """(margins of A, margins of B, labels, cluster ids): A sees more than B, questions on one picture are alike."""
    ids, labels = np.arange(n) % clusters, rng.random(n) < 0.5
    common = rng.normal(size=clusters)[ids]
    return 1.5 * labels + common + rng.normal(size=n), 0.7 * labels + common + rng.normal(size=n), labels, ids


def test_mcnemar_closed_forms():
    assert mcnemar_exact(0, 6) == mcnemar_exact(6, 0) == 0.03125
    assert mcnemar_exact(0, 0) == mcnemar_exact(1, 1) == mcnemar_exact(40, 40) == 1
    for b, c in product(range(0, 30, 3), range(1, 30, 4)):
        assert mcnemar_exact(b, c) == pytest.approx(reference.binomtest(b, b + c).pvalue)


def test_mcnemar_counts_what_only_one_side_has_right():
    assert mcnemar([1, 1, 0, 0, 1], [1, 0, 1, 0, 0]) == (2, 1, mcnemar_exact(2, 1))
    with pytest.raises(ValueError, match="lengths"):
        mcnemar([1, 0], [1])


def test_sign_flip_equals_scipy_and_mcnemar_on_independent_items():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 10))
    expected = reference.permutation_test((a, b), lambda x, y, axis: (x - y).mean(axis), vectorized=True,
                                          permutation_type="samples", n_resamples=np.inf).pvalue  # fmt: skip
    assert sign_flip_test(a, b) == pytest.approx(expected)
    right_a, right_b = np.r_[np.ones(9), np.zeros(3), np.ones(50)], np.r_[np.zeros(9), np.ones(3), np.ones(50)]
    assert sign_flip_test(right_a, right_b) == pytest.approx(mcnemar_exact(9, 3))
    right_a, right_b = hits(rng, 200, 0.7, 0.6)
    assert sign_flip_test(right_a, right_b) == pytest.approx(mcnemar(right_a, right_b)[2], abs=0.015)


def test_sign_flip_with_weights_equals_brute_force_over_clusters():
    rng = np.random.default_rng(1)
    ids = np.array(list("aabbbcddeeef"))
    a, b, wa, wb = rng.integers(0, 4, 12), rng.integers(0, 4, 12), rng.integers(1, 5, 12), rng.integers(1, 5, 12)

    def gap(swapped):
        take = np.isin(ids, [c for c, s in zip("abcdef", swapped, strict=True) if s])
        x, y, wx, wy = (np.where(take, q, p) for p, q in ((a, b), (b, a), (wa, wb), (wb, wa)))
        return abs(x.sum() / wx.sum() - y.sum() / wy.sum())

    values = np.array([gap(s) for s in product((0, 1), repeat=6)])
    assert sign_flip_test(a, b, ids, wa, wb) == pytest.approx((values >= values[0] - 1e-12).mean())


def test_drawn_sign_flips_agree_with_all_of_them(monkeypatch):
    rng = np.random.default_rng(2)
    a, b, ids = rng.normal(0.3, 1, 60), rng.normal(size=60), np.arange(60) // 5
    exact = sign_flip_test(a, b, ids)
    monkeypatch.setattr("mmllm.evaluate.paired.EXACT_CLUSTERS", 0)
    assert sign_flip_test(a, b, ids, flips=20_500) == pytest.approx(exact, abs=0.01)
    assert sign_flip_test(a + 100, b, ids, flips=99) == 0.01


def test_copies_inside_a_cluster_are_no_evidence_and_item_order_is_none():
    rng = np.random.default_rng(3)
    a, b = hits(rng, 40, 0.8, 0.5)
    many = [np.repeat(x, 6) for x in (a, b, np.arange(40))]
    assert sign_flip_test(*many) == pytest.approx(sign_flip_test(a, b))
    assert accuracy_difference(*many) == pytest.approx(accuracy_difference(a, b, np.arange(40)))
    assert mcnemar(*many[:2])[2] < mcnemar(a, b)[2]
    order = rng.permutation(240)
    assert accuracy_difference(*(x[order] for x in many)) == pytest.approx(accuracy_difference(*many))


def test_accuracy_difference_is_antisymmetric_and_singletons_are_the_ordinary_bootstrap():
    a, b = hits(np.random.default_rng(4), 300, 0.7, 0.6)
    gap = accuracy_difference(a, b)
    assert accuracy_difference(b, a) == pytest.approx((-gap.difference, -gap.high, -gap.low, gap.p))
    assert accuracy_difference(a, b, np.arange(300)) == gap
    assert gap.difference == pytest.approx(a.mean() - b.mean())
    half = 1.96 * (a - b).std() / math.sqrt(300)
    assert (gap.low, gap.high) == pytest.approx((gap.difference - half, gap.difference + half), abs=0.01)
    assert accuracy_difference(a, a)[:3] == (0, 0, 0) and accuracy_difference(a, a).p == 1


def test_auc_difference_equals_a_loop_over_drawn_items():
    a, b, labels, ids = yes_no(np.random.default_rng(5), 90, 30)
    index, draws = resampled_weights(ids, 90, 60, seed=7)
    gaps = []
    for draw in draws:
        items = np.repeat(np.arange(90), draw[index])
        gaps.append(auc(a[items], labels[items]) - auc(b[items], labels[items]))
    got = auc_difference(a, b, labels, ids, seed=7, resamples=60)
    assert got[:3] == pytest.approx((auc(a, labels) - auc(b, labels), *np.quantile(gaps, [0.025, 0.975])))
    assert (got.p <= 0.05) == (got.low > 0 or got.high < 0)


def test_auc_difference_ignores_a_leaning_that_moves_accuracy():
    a, b, labels, ids = yes_no(np.random.default_rng(6), 200, 50)
    gap = auc_difference(a, b, labels, ids)
    assert auc_difference(a + 5, b - 3, labels, ids) == pytest.approx(gap)
    assert ((a + 5 > 0) == labels).mean() < ((a > 0) == labels).mean() - 0.1
    # Both sides come from the same resamples: a margin that ranks alike differs in none of them.
    assert auc_difference(a, np.exp(a), labels, ids) == (0, 0, 0, 1)
    order = np.random.default_rng(0).permutation(200)
    assert auc_difference(a[order], b[order], labels[order], ids[order]) == pytest.approx(gap)
    assert auc_difference(b, a, labels, ids) == pytest.approx((-gap.difference, -gap.high, -gap.low, gap.p))
    singletons = auc_difference(a, b, labels, np.arange(200))
    assert singletons == auc_difference(a, b, labels) and singletons != gap


def test_a_handful_of_pictures_is_never_sure():
    labels, ids = np.array([1, 0] * 3, bool), np.repeat(np.arange(3), 2)
    perfect = labels.astype(float)
    gap = auc_difference(perfect, -perfect, labels, ids)
    assert gap.difference == gap.low == 1 and gap.p == 0.25
    assert compare_aucs("x", perfect, -perfect, labels, ids).verdict == "within noise"
    assert sign_flip_test(perfect, 1 - perfect, ids) == 1


def test_empty_input_and_one_class_are_unknown():
    assert np.isnan(auc_difference([1, 2], [2, 1], [1, 1])).all() and np.isnan(auc_difference([], [], [])).all()
    assert np.isnan(accuracy_difference([], [])).all() and np.isnan(hierarchical_difference([], [], [])).all()
    line = compare_rows("x", [], [])
    assert line.verdict == "within noise" and line.to_dict()["p"] is None and line.n == 0


def test_portions_do_not_change_an_auc(monkeypatch):
    a, b, labels, ids = yes_no(np.random.default_rng(7), 50, 20)
    whole = auc_difference(a, b, labels, ids, resamples=300)
    monkeypatch.setattr(stats, "PORTION", 333)
    assert auc_difference(a, b, labels, ids, resamples=300) == whole


@pytest.mark.parametrize("discriminative", [False, True])
def test_hierarchical_with_one_seed_or_equal_seeds_is_the_plain_bootstrap(discriminative):
    a, b, labels, ids = yes_no(np.random.default_rng(8), 120, 40)
    if discriminative:
        plain, labelled = auc_difference(a, b, labels, ids), {"labels": labels}
    else:
        a, b = (a > 0) == labels, (b > 0) == labels
        plain, labelled = accuracy_difference(a, b, ids), {}
    assert hierarchical_difference(a, b, np.zeros(120), ids, **labelled)[:3] == pytest.approx(plain[:3])
    # The same answers under three seeds tell no more than once: the pictures are the same.
    three = {k: np.tile(v, 3) for k, v in labelled.items()}
    again = hierarchical_difference(np.tile(a, 3), np.tile(b, 3), np.repeat([5, 6, 7], 120), np.tile(ids, 3), **three)
    assert again[:3] == pytest.approx(plain[:3])


def test_hierarchical_carries_the_variance_of_few_seeds_in_full():
    gains = np.array([0.1, 0.2, 0.6, 0.3])
    a, seeds, ids = np.repeat(gains, 25), np.repeat(np.arange(4), 25), np.tile(np.arange(25), 4)
    got = hierarchical_difference(a, np.zeros(100), seeds, ids, resamples=4000)
    assert got.difference == pytest.approx(0.3)
    drawn = np.array([0.3 + math.sqrt(4 / 3) * (np.mean(d) - 0.3) for d in product(gains, repeat=4)])
    assert drawn.std() == pytest.approx(gains.std(ddof=1) / 2)
    assert (got.low, got.high) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])), abs=0.02)


def test_paired_t_equals_scipy():
    rng = np.random.default_rng(9)
    a, b = rng.normal(0.5, 1, 5), rng.normal(size=5)
    expected = reference.ttest_rel(a, b)
    low, high = expected.confidence_interval()
    assert paired_t(a, b) == pytest.approx(((a - b).mean(), low, high, expected.pvalue))
    one = paired_t([0.7], [0.5])
    assert one.difference == pytest.approx(0.2) and np.isnan(one[1:]).all() and np.isnan(paired_t([], [])).all()
    assert paired_t([3, 4], [1, 2]) == (2, 2, 2, 0) and paired_t([1, 2], [1, 2]) == (0, 0, 0, 1)


def test_holm_by_hand_and_its_properties():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1, 1] and holm([]) == [] and holm([0.03]) == [0.03]
    got = holm([0.02, math.nan, 0.01])
    assert got[0] == got[2] == 0.02 and math.isnan(got[1])
    p = np.random.default_rng(10).random(20) ** 3
    adjusted = np.array(holm(p))
    assert (np.diff(adjusted[np.argsort(p)]) >= 0).all() and (p <= adjusted).all() and (adjusted <= 1).all()
    order = np.random.default_rng(0).permutation(20)
    assert holm(p[order]) == adjusted[order].tolist()
    # The definition: reject the smallest ones as long as p_(i) <= alpha / (m - i).
    for alpha in (0.01, 0.05, 0.2):
        ranked = np.sort(p)
        steps = np.append(ranked > alpha / np.arange(20, 0, -1), True)
        assert (adjusted <= alpha).sum() == steps.argmax()


def test_intervals_cover_the_truth_and_tests_keep_their_level_on_clustered_data():
    rng, covered, inside, flips, naive = np.random.default_rng(11), 0, 0, 0, 0
    for _ in range(150):
        ids = np.repeat(np.arange(40), 6)
        # Which side is right hangs on the picture, and neither side is better.
        lead = rng.normal(size=40)[ids]
        a, b = lead + rng.normal(size=240) > 0, -lead + rng.normal(size=240) > 0
        gap = accuracy_difference(a, b, ids, resamples=300, flips=400)
        covered += gap.low <= 0 <= gap.high
        flips += gap.p <= 0.05
        naive += mcnemar(a, b)[2] <= 0.05
        x, y, labels, pictures = yes_no(rng, 160, 40)
        found = auc_difference(x, y, labels, pictures, resamples=200)
        truth = reference.norm.cdf([1.5 / 2, 0.7 / 2])
        inside += found.low <= truth[0] - truth[1] <= found.high
    assert 0.88 <= covered / 150 <= 0.99 and 0.88 <= inside / 150 <= 0.99
    assert flips / 150 <= 0.09 and naive / 150 > 0.2


def test_compare_rows_decides_by_clusters_and_shows_mcnemar_beside():
    a, b = np.r_[np.ones(9), np.zeros(11)], np.r_[np.zeros(8), np.ones(1), np.zeros(11)]
    alone = compare_rows("x", a, b)
    assert alone.p == alone.mcnemar == mcnemar_exact(8, 0) and alone.verdict == "a better"
    assert (alone.value_a, alone.value_b, alone.n, alone.clusters) == (0.45, 0.05, 20, 20)
    assert compare_rows("x", b, a).verdict == "b better"
    assert compare_rows("x", a, b, better="lower").verdict == "b better"
    clustered = compare_rows("x", a, b, np.arange(20) // 4)
    assert clustered.mcnemar == alone.mcnemar and clustered.p == 0.5 and clustered.verdict == "within noise"
    assert compare_rows("x", a, a).verdict == "within noise"
    # Too many differing items to go through all sign patterns: the exact p stands there all the same.
    many = compare_rows("x", np.r_[np.ones(20), np.zeros(9)], np.r_[np.zeros(20), np.ones(9)])
    assert many.p == many.mcnemar == mcnemar_exact(20, 9)
    ratio = compare_rows("x", 2 * a, b, weights_a=np.full(20, 3), weights_b=np.full(20, 3))
    assert ratio.mcnemar is None and ratio.value_a == pytest.approx(0.3)


def test_a_verdict_needs_the_interval_and_the_adjusted_p():
    sure = Comparison("x", 9, 9, 0.6, 0.5, 0.1, 0.01, 0.2, 0.01, 0.04)
    assert sure.verdict == "a better" and replace(sure, p_adjusted=0.06).verdict == "within noise"
    assert replace(sure, low=-0.01).verdict == "within noise"
    assert replace(sure, difference=-0.1, low=-0.2, high=-0.01).verdict == "b better"
    assert replace(sure, better="lower").verdict == "b better"


def test_holm_over_lines_takes_back_a_verdict():
    a, b = np.r_[np.ones(7), np.zeros(43)], np.zeros(50)
    lines = [compare_rows("one", a, b), *(compare_rows(f"same{i}", a, a) for i in range(5))]
    assert lines[0].verdict == "a better" and lines[0].p == pytest.approx(2 / 2**7)
    adjusted = holm_adjusted(lines)
    assert adjusted[0].p_adjusted == pytest.approx(6 * lines[0].p) and adjusted[0].verdict == "within noise"
    assert adjusted[0].to_dict()["verdict"] == "within noise" and adjusted[0].p == lines[0].p
