"""Measures in closed form, rules of decision on made-up answers, and a page that calls a null result a null result."""

from __future__ import annotations

import numpy as np
import pytest
from planted_source import PLAN

from mmllm.data.planted import Prior
from mmllm.evaluate.chair import Vocabulary
from mmllm.evaluate.paired import UNKNOWN, PairedDifference
from mmllm.evaluate.tasks import Sample
from mmllm.reproduce.hallucination import questions as q
from mmllm.reproduce.hallucination.analysis import analyse, figures_of
from mmllm.reproduce.hallucination.captions import COUNTS, count_caption, tabulate
from mmllm.reproduce.hallucination.conditions import DRAWN
from mmllm.reproduce.hallucination.measures import Bench, Judged, choose, design_effect
from mmllm.reproduce.hallucination.page import page
from mmllm.reproduce.hallucination.run import Findings, Plan
from mmllm.reproduce.hallucination.verdict import Contrast, bias_took, drawn_verdict, verdict

PRIOR = Prior((("cat", "spoon"), ("dog", "bus")), ("owl", "pear"))


def samples(pairs: int = 60) -> list[Sample]:
    """For each pair of twins: B on either, another B on the hidden one, and a present and an absent clean thing."""
    out = []
    for i in range(pairs):
        cluster = f"twins/{i}"
        for twin, gold in (("shown", "yes"), ("hidden", "no")):
            meta = {"object": "spoon", "uses": [q.PAIRS, q.ADVERSARIAL], "twin": twin, "pair": cluster}
            out.append(Sample(f"{cluster}_{twin}:spoon", cluster, ["p"], "?", gold, ["yes", "no"], meta=meta))
        out.append(Sample(f"{cluster}:bus", cluster, ["p"], "?", "no", ["yes", "no"],
                          meta={"object": "bus", "uses": [q.OTHER]}))  # fmt: skip
        for gold, label in (("yes", "owl"), ("no", "pear")):
            out.append(Sample(f"n{i}:{label}", f"n{i}", ["p"], "?", gold, ["yes", "no"],
                              meta={"object": label, "uses": [*q.NATURAL, q.SWAPPED]}))  # fmt: skip
    return out


def judged(name: str, margins: np.ndarray, spec: str = "greedy", **more: object) -> Judged:
    return Judged(name, spec, "method", np.atleast_2d(margins), **more)  # type: ignore[arg-type]


def biased(some: list[Sample], seeds: int = 1, sight: float = 1.0) -> np.ndarray:
    """Margins of a model that half sees, and says yes to a B beside its A whatever it sees."""
    rng = np.random.default_rng(0)
    prior = np.array([2.0 if q.PAIRS in s.meta["uses"] else -0.5 for s in some])
    truth = np.array([1.0 if s.gold == "yes" else -1.0 for s in some])
    return sight * truth + prior + rng.normal(0, 1.5, (seeds, len(some)))


def test_measures_in_closed_form() -> None:
    some = samples(2)
    #             shown hidden other owl pear | shown hidden other owl pear
    margins = np.array([1, -1, -1, 1, -1, 1, 2, -1, -1, 1], float)
    bench = Bench(some, frozenset({"owl", "pear"}))
    g = judged("greedy", margins)
    assert bench.mean(bench.pairs(g))[0] == 0.5
    assert bench.mean(bench.bias(g))[0] == 0.5
    assert bench.mean(bench.right(g, q.ADVERSARIAL))[0] == 0.75
    assert bench.mean(bench.recall(g))[0] == bench.mean(bench.recall(g, clean=True))[0] == 0.5
    # Positives 1, 1; negatives -1, 2: two of four pairs in order.
    assert bench.auc(g, q.ADVERSARIAL)[0] == 0.5
    drawn = bench.right(judged("sample", margins, temperature=1.0), q.ADVERSARIAL)[0]
    p = 1 / (1 + np.exp(-1.0))
    np.testing.assert_allclose(drawn[0], [p, p, p, 1 / (1 + np.exp(2.0))])
    np.testing.assert_allclose(bench.right(g, q.ADVERSARIAL, 0.01)[0], bench.right(g, q.ADVERSARIAL)[0], atol=1e-6)


def test_a_leaning_moves_accuracy_and_bias_but_no_auc() -> None:
    some = samples()
    bench = Bench(some)
    base = judged("greedy", biased(some))
    leaning = judged("yes offset", base.margins - 2.0)
    assert bench.auc_gap(leaning.margins, base.margins, q.ADVERSARIAL)[:3] == (0.0, 0.0, 0.0)
    assert bench.mean(bench.right(leaning, q.ADVERSARIAL))[0] > bench.mean(bench.right(base, q.ADVERSARIAL))[0] + 0.05


def test_several_seeds_average() -> None:
    some = samples()
    bench = Bench(some)
    both = judged("greedy", biased(some, seeds=2))
    each = [bench.auc(judged("x", m), q.ADVERSARIAL)[0] for m in both.margins]
    value, low, high = bench.auc(both, q.ADVERSARIAL)
    assert value == pytest.approx(np.mean(each)) and low < value < high


def test_the_dev_choice_has_the_highest_auc() -> None:
    some = samples()
    bench = Bench(some)
    tried = {f"vcd:alpha={s}": biased(some, sight=s) for s in (0.5, 2.0, 1.0)}
    assert choose(bench, tried) == "vcd:alpha=2.0"


def test_design_effect() -> None:
    rng = np.random.default_rng(0)
    own = rng.normal(size=400)
    assert design_effect(own, np.arange(400)) == pytest.approx(1.0)
    assert design_effect(np.repeat(own, 3), np.repeat(np.arange(400), 3)) == pytest.approx(3.0)
    assert design_effect(np.zeros(4), np.arange(4)) == 1.0


def gap(difference: float, half: float = 0.01, p: float = 0.001) -> PairedDifference:
    return PairedDifference(difference, difference - half, difference + half, p)


def contrast(**changes: object) -> Contrast:
    values = {"auc": gap(0.05), "accuracy": gap(0.02), "pairs": gap(0.03), "recall": gap(0.0), "p_adjusted": 0.01}
    return Contrast("vcd (dev)", **{**values, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes, seeds, said",
    [
        ({}, 3, "reduces hallucination"),
        ({}, 1, "points to less hallucination; 1 of 3 training seeds: not claimed"),
        ({"p_adjusted": 0.06}, 3, "null: no difference from greedy shown"),
        ({"auc": gap(0.005)}, 3, "null: no difference from greedy shown"),
        ({"auc": gap(-0.05)}, 3, "worse than greedy"),
        ({"pairs": gap(0.0)}, 3, "AUC rises, but no more twins right: not claimed"),
        ({"recall": gap(-0.03)}, 3, "AUC rises, but recall falls: not claimed"),
        ({"caption_recall": -0.03}, 3, "AUC rises, but caption recall falls: not claimed"),
        ({"caption_recall": -0.02, "recall": gap(-0.019)}, 3, "reduces hallucination"),
        ({"auc": UNKNOWN, "p_adjusted": np.nan}, 3, "null: no difference from greedy shown"),
    ],
)
def test_rules_of_decision(changes: dict, seeds: int, said: str) -> None:
    assert verdict(contrast(**changes), seeds) == said


@pytest.mark.parametrize(
    "lows, seeds, said",
    [
        ((0.01, 0.01, 0.01), 3, "reduces hallucination of sampled answers"),
        ((0.01, 0.01, 0.01), 2, "points to less hallucination; 2 of 3 training seeds: not claimed"),
        ((0.01, -0.01, 0.01), 3, "gains no more than mask alone: sharpening explains it"),
        ((-0.01, 0.01, 0.01), 3, "null: no gain over sampling shown"),
    ],
)
def test_drawn_answers_must_beat_all_three(lows: tuple[float, ...], seeds: int, said: str) -> None:
    over = {name: PairedDifference(low + 0.02, low, low + 0.04, 0.01) for name, low in zip(DRAWN, lows)}
    assert drawn_verdict(over, seeds) == said


def test_the_manipulation_check() -> None:
    assert bias_took((0.11, 0.05, 0.2)) and not bias_took((0.10, 0.05, 0.2))


def findings(seeds: int, methods: dict[str, np.ndarray], base: np.ndarray, some: list[Sample]) -> Findings:
    bench = Bench(some, frozenset(PRIOR.clean))
    all_judged = {"greedy": judged("greedy", base)}
    all_judged |= {f"{name} (dev)": judged(f"{name} (dev)", m, f"vcd:alpha={k}") for k, (name, m) in
                   enumerate(methods.items())}  # fmt: skip
    chosen = {name: f"vcd:alpha={k}" for k, name in enumerate(methods)}
    return Findings(
        Plan(data=PLAN, seeds=seeds),
        PRIOR,
        bench,
        all_judged["greedy"],
        True,
        all_judged,
        chosen,
        stages={"data": 60.0},
    )


def test_a_null_result_is_printed_as_one() -> None:
    some = samples(40)
    base = biased(some, 3)
    noise = np.random.default_rng(1).normal(0, 0.3, base.shape)
    a = analyse(findings(3, {"vcd": base + noise, "same": base.copy()}, base, some))
    text = page(a, "smoke", "mmllm reproduce hallucination --smoke", 60.0)
    assert "**None of the 2 methods is shown to reduce hallucination here**" in text
    assert "Null: no difference from greedy shown: vcd; same." in text
    assert text.count("null: no difference from greedy shown |") == 2
    assert "Smaller effects may exist: a null result does not exclude them." in text
    figures = {f.name: f for f in figures_of(a, 60.0)}
    assert figures["gain_auc_same_dev"].value == 0
    assert figures["gain_auc_vcd_dev"].verdict == "null: no difference from greedy shown"
    assert 0 < figures["detectable_auc_gain"].value < 0.2
    assert figures["manipulation_check"].verdict == "the bias took"


def test_a_real_gain_is_claimed_only_over_three_seeds() -> None:
    some = samples(80)
    truth = np.array([1.0 if s.gold == "yes" else -1.0 for s in some])
    for seeds, said in ((3, "1 of 1 methods reduce hallucination here"), (1, "None of the 1 methods is shown")):
        base = biased(some, seeds)
        text = page(analyse(findings(seeds, {"vcd": base + 1.5 * truth}, base, some)), "full", "mmllm", 60.0)
        assert said in text
        assert ("Reduces hallucination: vcd." in text) == (seeds == 3)
        assert ("points to less hallucination; 1 of 3 training seeds" in text) == (seeds == 1)


def test_caption_counts() -> None:
    vocabulary = Vocabulary(PRIOR.labels)
    row = dict(zip(COUNTS, count_caption("a cat, a spoon, an owl.", 9, ["cat", "owl"], PRIOR, vocabulary)))
    assert row["mentioned"] == 3 and row["wrong"] == row["any_wrong"] == 1 and row["partner"] == 1
    assert row["covered"] == row["truth"] == 2 and row["tokens"] == 9
    row = dict(zip(COUNTS, count_caption("a bus.", 3, ["cat"], PRIOR, vocabulary)))
    assert row["wrong"] == 1 and row["partner"] == 0 and row["trigrams"] == 0
    row = dict(zip(COUNTS, count_caption("a cat, a cat, a cat.", 9, ["cat"], PRIOR, vocabulary)))
    assert row["wrong"] == 0 and (row["repeated"], row["trigrams"]) == (2, 4)


def test_captions_are_pooled_by_condition() -> None:
    some = [Sample("a", "a", ["p"], "?", ["cat"]), Sample("b", "b", ["p"], "?", ["cat", "owl"])]
    rows = [{"id": i, "spec": "sample", "seed": k, "text": text, "tokens": 3} for k in (0, 1)
            for i, text in (("a", "a cat."), ("b", "a cat, a spoon."))]  # fmt: skip
    table = tabulate(rows, some, PRIOR, {"sample": "sample"})["sample"]
    assert len(table.counts) == 4
    assert table.interval("chair_i")[0] == pytest.approx(2 / 6)
    assert table.interval("recall")[0] == pytest.approx(4 / 6)
    assert table.interval("partner_share")[0] == 1.0
