"""Applies the rules of decision: did the bias take, does a method reduce hallucination, and what could be noticed?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mmllm.evaluate.paired import ALPHA, PairedDifference, holm, sign_flip_test
from mmllm.evaluate.power import detectable_gain
from mmllm.reproduce.hallucination import questions as q
from mmllm.reproduce.hallucination.conditions import BIAS, DRAWN, RECALL_LOSS, SEEDS_FOR_CLAIM
from mmllm.reproduce.hallucination.measures import Bench, Interval, Judged, design_effect

# Normal quantiles: what separates "80 % of the time" from the middle, and half a 95 % interval in standard errors.
POWER_SHIFT = 1.959964 + 0.841621
HALF = 1.959964


@dataclass
class Contrast:
    """A condition against greedy, at T = 0 unless the condition itself draws.

    Attributes:
        auc, accuracy: on the primary endpoint's questions; pairs: twins both right; recall: of present things.
        caption_recall: difference, None where no captions were written.
        p_adjusted: of ``auc`` after Holm over the confirmatory comparisons; NaN for an exploratory one.
        discordant: per training seed (right only here, right only by greedy, McNemar's exact p), questions independent.
        flip_p: of the difference in accuracy, by flipping whole pictures.
        verdict: what may be said; empty for an exploratory comparison.
    """

    name: str
    auc: PairedDifference
    accuracy: PairedDifference
    pairs: PairedDifference
    recall: PairedDifference
    caption_recall: float | None = None
    p_adjusted: float = math.nan
    discordant: Sequence[tuple[int, int, float]] = ()
    flip_p: float = math.nan
    verdict: str = ""


def bias_took(bias: Interval) -> bool:
    """The manipulation check on greedy's answers."""
    return bias[0] > BIAS


def contrast(bench: Bench, judged: Judged, base: Judged, caption_recall: float | None = None) -> Contrast:
    """All differences of a condition from the base."""
    use = q.ADVERSARIAL
    (here, clusters), (there, _) = bench.right(judged, use), bench.right(base, use)
    every = np.tile(clusters, len(here))
    return Contrast(
        judged.name,
        bench.auc_gap(judged.margins, base.margins, use),
        bench.gap((here, clusters), (there, clusters)),
        bench.gap(bench.pairs(judged), bench.pairs(base)),
        bench.gap(bench.recall(judged), bench.recall(base)),
        caption_recall,
        discordant=() if judged.temperature else bench.mcnemar(judged, base, use),
        flip_p=sign_flip_test(here.ravel(), there.ravel(), every, seed=bench.seed),
    )


def judge(contrasts: Sequence[Contrast], seeds: int) -> None:
    """Fills ``p_adjusted`` and ``verdict`` of the confirmatory comparisons."""
    for c, p in zip(contrasts, holm(c.auc.p for c in contrasts), strict=True):
        c.p_adjusted = p
        c.verdict = verdict(c, seeds)


def verdict(c: Contrast, seeds: int) -> str:
    """What the rules allow to say about a confirmatory comparison."""
    sure = c.p_adjusted <= ALPHA
    if sure and c.auc.high < 0:
        return "worse than greedy"
    if not (sure and c.auc.low > 0):
        return "null: no difference from greedy shown"
    missing = []
    if not c.pairs.difference > 0:
        missing.append("no more twins right")
    if c.recall.difference < -RECALL_LOSS:
        missing.append("recall falls")
    if c.caption_recall is not None and c.caption_recall < -RECALL_LOSS:
        missing.append("caption recall falls")
    if missing:
        return f"AUC rises, but {' and '.join(missing)}: not claimed"
    if seeds < SEEDS_FOR_CLAIM:
        return f"points to less hallucination; {seeds} of {SEEDS_FOR_CLAIM} training seeds: not claimed"
    return "reduces hallucination"


@dataclass
class Drawn:
    """A method's answers drawn at T = 1: expected accuracy minus that of each of ``DRAWN``, and what may be said."""

    name: str
    over: dict[str, PairedDifference]
    verdict: str


def drawn(bench: Bench, judged: Judged, rivals: Sequence[Judged]) -> Drawn:
    """Compares a method at T = 1 with plain sampling, the mask alone and a lower temperature.

    Args:
        rivals: the conditions ``DRAWN``, at their own temperatures.
    """
    use = q.ADVERSARIAL
    own = bench.right(judged, use, 1.0)
    over = {r.name: bench.gap(own, bench.right(r, use)) for r in rivals}
    return Drawn(judged.name, over, drawn_verdict(over, len(judged.margins)))


def drawn_verdict(over: Mapping[str, PairedDifference], seeds: int) -> str:
    """What the rules allow to say; ``over``: rival -> difference, plain sampling first."""
    unbeaten = [name for name, gap in over.items() if not gap.low > 0]
    if DRAWN[0] in unbeaten:
        return "null: no gain over sampling shown"
    if unbeaten:
        return f"gains no more than {' and '.join(unbeaten)}: sharpening explains it"
    if seeds < SEEDS_FOR_CLAIM:
        return f"points to less hallucination; {seeds} of {SEEDS_FOR_CLAIM} training seeds: not claimed"
    return "reduces hallucination of sampled answers"


@dataclass
class Power:
    """What this run could notice with a chance of 80 %.

    Attributes:
        auc: smallest difference in AUC, from the widest interval of the confirmatory comparisons.
        accuracy: smallest difference in accuracy by McNemar's test, for the discordance seen (the median one).
        questions, pictures: of the primary endpoint, per training seed; design: the design effect of asking several
            questions about one picture.
    """

    auc: float
    accuracy: float
    discordance: float
    design: float
    questions: int
    pictures: int


def power(bench: Bench, contrasts: Sequence[Contrast], judged: Sequence[Judged], base: Judged) -> Power:
    """The power statement, from the confirmatory comparisons as they came out."""
    use = q.ADVERSARIAL
    half = max(((c.auc.high - c.auc.low) / 2 for c in contrasts), default=math.nan)
    before, clusters = bench.right(base, use)
    shares, effects = [], []
    for j in judged:
        change = (bench.right(j, use)[0] - before)[0]
        shares.append(float((change != 0).mean()))
        effects.append(design_effect(change, clusters))
    discordance = float(np.median(shares)) if shares else math.nan
    design = float(np.median(effects)) if effects else math.nan
    questions = int(bench.use(use).sum())
    gain = detectable_gain(questions, discordance, design_effect=design) if 0 < discordance < 1 else math.nan
    return Power(half / HALF * POWER_SHIFT, gain, discordance, design, questions, len(set(clusters)))
