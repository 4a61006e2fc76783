"""Figures that benchmarks share: groups, sums of ratios, and where denominators are empty."""

import math

import numpy as np
import pytest

from mmllm.evaluate.benchmarks.base import Answered, first_clusters
from mmllm.evaluate.benchmarks.scores import grouped, ratio_sum_interval, slug, unparsed_figure, yes_no_figures
from mmllm.evaluate.stats import ratio_interval
from mmllm.evaluate.tasks import Sample


def row(number, gold, said, cluster=None, control=False, scores=None, **meta):
    sample = Sample(str(number), str(number if cluster is None else cluster), ["x"], "", gold, ["yes", "no"],
                    control=control, meta=meta)  # fmt: skip
    return Answered(sample, said or "", scores, hit=float(said == gold), parsed=said)


def test_one_ratio_is_the_ordinary_interval():
    rng = np.random.default_rng(0)
    hits, clusters = (rng.random(60) < 0.6).astype(float), rng.integers(0, 20, 60)
    named = [str(c) for c in clusters]
    assert ratio_sum_interval([(hits, np.ones(60), named, 1.0)]) == pytest.approx(
        ratio_interval(hits, np.ones(60), named))  # fmt: skip


def test_a_sum_of_ratios_has_the_sum_of_the_values_and_shares_clusters():
    hits = np.array([1.0, 0, 1, 1])
    parts = [(x, np.ones(4), list("abcd"), 2.0) for x in (hits, 1 - hits)]
    value, low, high = ratio_sum_interval(parts)
    # The two ratios are each other's complement in every resample, so their sum never moves.
    assert (value, low, high) == pytest.approx((2, 2, 2))
    assert math.isnan(ratio_sum_interval([])[0])


def test_groups_are_right_as_a_whole_and_controls_stay_apart():
    rows = [row(0, "yes", "yes", group="a"), row(1, "no", "yes", group="a"), row(2, "no", "no", group="b"),
            row(0, "yes", "yes", group="a", control=True), row(3, "yes", "yes", group=None)]  # fmt: skip
    groups = {(g.sample.id, g.sample.control): g.hit for g in grouped(rows, lambda r: r.sample.meta["group"])}
    assert groups == {("a", False): 0, ("b", False): 1, ("a", True): 1}


def test_no_as_the_positive_answer_and_empty_denominators():
    rows = [row(0, "yes", "yes"), row(1, "no", "yes"), row(2, "no", None)]
    got = {f.name: f.value for f in yes_no_figures("x", rows, 0, positive="no")}
    assert got == {"x_accuracy": pytest.approx(1 / 3), "x_precision": 0, "x_recall": 0, "x_f1": 0,
                   "x_yes_ratio": pytest.approx(2 / 3)}  # fmt: skip
    assert unparsed_figure("x", rows).value == pytest.approx(1 / 3)


def test_margins_of_controls_do_not_enter_the_auc():
    rows = [row(0, "yes", "yes", scores=[-1.0, -2.0]), row(1, "no", "no", scores=[-2.0, -1.0]),
            row(0, "yes", "yes", control=True, scores=[-9.0, -1.0])]  # fmt: skip
    assert next(f for f in yes_no_figures("x", rows, 0) if f.name == "x_auc").value == 1


def test_margin_of_a_choice_is_the_true_one_minus_the_best_other():
    sample = Sample("1", "1", [], "", "b", ["a", "b", "c"])
    assert Answered(sample, "", [-3.0, -1.0, -2.5]).margin == 1.5
    assert Answered(sample, "", None).margin is None


def test_a_limit_takes_clusters_of_every_split():
    samples = [Sample(str(i), str(i // 2), [], "", None, meta={"split": "ab"[i // 6]}) for i in range(12)]
    assert [s.id for s in first_clusters(samples, 1)] == ["0", "1", "6", "7"]
    assert first_clusters(samples, None) == samples


def test_names_of_figures():
    assert [slug(x) for x in ("OCR", "a b-c", "L2: x/y ", 3)] == ["OCR", "a_b_c", "L2_x_y", "3"]
