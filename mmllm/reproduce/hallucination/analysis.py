"""From what was found to statistics: every comparison with greedy, and the figures in the common form."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mmllm.report.figures import Figure
from mmllm.reproduce.hallucination import questions as q
from mmllm.reproduce.hallucination.captions import MEASURES
from mmllm.reproduce.hallucination.conditions import BASE, BIAS, DRAWN
from mmllm.reproduce.hallucination.measures import Interval, Judged
from mmllm.reproduce.hallucination.run import Findings
from mmllm.reproduce.hallucination.verdict import Contrast, Drawn, Power, contrast, drawn, judge, power

SETS = {"twins": q.ADVERSARIAL, "natural": q.NATURAL[2], "swapped": q.SWAPPED}
SETS |= {"natural_random": q.NATURAL[0], "natural_popular": q.NATURAL[1]}


@dataclass
class Analysis:
    """The findings with all statistics.

    Attributes:
        bias: the manipulation check.
        confirmed: dev-chosen settings against greedy, judged by the rules; explored: all other conditions, by name.
        drawn: the same settings at T = 1.
        power: None where nothing was compared.
    """

    found: Findings
    bias: Interval
    confirmed: list[Contrast]
    explored: dict[str, Contrast]
    drawn: list[Drawn]
    power: Power | None

    @property
    def base(self) -> Judged:
        return self.found.judged[BASE]

    @property
    def seeds(self) -> list[int]:
        """The training seeds."""
        return list(range(len(self.base.margins)))


def analyse(found: Findings) -> Analysis:
    """All comparisons with greedy; only the dev-chosen settings are confirmatory."""
    bench, base = found.bench, found.judged[BASE]
    names = [f"{name} (dev)" for name in found.chosen]
    contrasts = {
        name: contrast(bench, judged, base, caption_gap(found, name))
        for name, judged in found.judged.items()
        if name != BASE
    }
    confirmed = [contrasts.pop(name) for name in names]
    judge(confirmed, len(base.margins))
    able = power(bench, confirmed, [found.judged[n] for n in names], base) if confirmed else None
    rivals = [found.judged[n] for n in DRAWN if n in found.judged]
    at_one = [drawn(bench, found.judged[n], rivals) for n in names]
    return Analysis(found, bench.mean(bench.bias(found.check)), confirmed, contrasts, at_one, able)


def caption_gap(found: Findings, name: str) -> float | None:
    """Recall of a condition's captions minus that of greedy's; None where one of them wrote none."""
    if name not in found.captions or BASE not in found.captions:
        return None
    return found.captions[name].interval("recall")[0] - found.captions[BASE].interval("recall")[0]


def slug(name: str) -> str:
    """A condition's name as part of a figure's name."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def show_p(p: float) -> str:
    return "not computed" if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def figures_of(a: Analysis, wall: float) -> list[Figure]:
    """All figures: the check, the power, the confirmatory comparisons, then every condition and the rest."""
    took = "the bias took" if a.found.took else "the bias did not take"
    out = [_figure(a, "manipulation_check", a.bias, "higher", target=BIAS, verdict=took,
                   note="greedy: false yes about B beside its A, minus that without its A")]  # fmt: skip
    if a.power:
        note = f"with a chance of 80 %; discordance {a.power.discordance:.3f}, design effect {a.power.design:.2f}"
        out.append(Figure("detectable_auc_gain", a.power.auc, "lower", unit="fraction", note="with a chance of 80 %"))
        out.append(Figure("detectable_accuracy_gain", a.power.accuracy, "lower", n=a.power.questions,
                          unit="fraction", note=note))  # fmt: skip
    for c in a.confirmed:
        out += contrast_figures(a, c)
    for d in a.drawn:
        for rival, gap in d.over.items():
            name = f"gain_drawn_{slug(d.name)}_over_{slug(rival)}"
            out.append(_figure(a, name, gap[:3], note=f"p {show_p(gap.p)}; {d.verdict}"))
    for judged in a.found.judged.values():
        out += condition_figures(a, judged)
    for c in a.explored.values():
        out += contrast_figures(a, c)
    note = "all stages, those of earlier calls included"
    return [*out, Figure("wall_seconds", wall, "lower", unit="s", note=note)]


def condition_figures(a: Analysis, judged: Judged) -> list[Figure]:
    """Every measure of one condition."""
    bench, key = a.found.bench, slug(judged.name)
    note = "; ".join(filter(None, (judged.spec, judged.note))) or None
    out = []
    for name, use in SETS.items():
        pick = bench.use(use)
        n = int(pick.sum())
        yes = bench.mean((judged.yes()[:, pick], bench.clusters[pick]))
        right = bench.mean(bench.right(judged, use))
        out += [_figure(a, f"auc_{name}_{key}", bench.auc(judged, use), n=n, chance=0.5, note=note),
                _figure(a, f"accuracy_{name}_{key}", right, n=n, chance=0.5, note=note),
                _figure(a, f"yes_ratio_{name}_{key}", yes, n=n, chance=0.5)]  # fmt: skip
    sampled = bench.mean(bench.right(judged, q.ADVERSARIAL, 1.0))
    n = int(bench.use(q.ADVERSARIAL).sum())
    out += [
        _figure(a, f"accuracy_twins_t1_{key}", sampled, n=n, chance=0.5, note="expected, answers drawn at T = 1"),
        _figure(a, f"pairs_{key}", bench.mean(bench.pairs(judged)), n=len(bench.twins[0]), chance=0.25,
                note="twins both answered right"),
        _figure(a, f"bias_{key}", bench.mean(bench.bias(judged)), "lower", n=len(bench.gaps[0]),
                note="false yes about B beside its A, minus that without its A"),
        _figure(a, f"recall_{key}", bench.mean(bench.recall(judged)), note="yes about present things, natural scenes"),
        _figure(a, f"recall_clean_{key}", bench.mean(bench.recall(judged, True)), note="of them those in no pair"),
    ]  # fmt: skip
    if judged.name in a.found.captions:
        table = a.found.captions[judged.name]
        for measure, (_, _, better) in MEASURES.items():
            unit = "tokens" if measure == "tokens" else "fraction"
            out.append(_figure(a, f"caption_{measure}_{key}", table.interval(measure), better, unit=unit,
                               n=len(table.counts)))  # fmt: skip
    return out


def contrast_figures(a: Analysis, c: Contrast) -> list[Figure]:
    """The differences of a condition from greedy."""
    notes = {name: f"p {show_p(gap.p)}" for name, gap in (("auc", c.auc), ("pairs", c.pairs), ("recall", c.recall))}
    if not math.isnan(c.p_adjusted):
        notes["auc"] += f"; {show_p(c.p_adjusted)} after Holm over {len(a.confirmed)}"
    notes["accuracy"] = f"p {show_p(c.flip_p)} by flipping whole pictures"
    if c.discordant:
        each = "; ".join(f"{only} against {other}, p {show_p(p)}" for only, other, p in c.discordant)
        notes["accuracy"] += f"; McNemar, questions as if independent, per training seed: {each}"
    gaps = {"auc": c.auc, "accuracy": c.accuracy, "pairs": c.pairs, "recall": c.recall}
    return [
        _figure(a, f"gain_{name}_{slug(c.name)}", gap[:3], note=notes[name],
                verdict=(c.verdict or None) if name == "auc" else None)
        for name, gap in gaps.items()
    ]  # fmt: skip


def _figure(
    a: Analysis, name: str, value: Interval, better: str = "higher", unit: str = "fraction", **more: Any
) -> Figure:
    return Figure(name, value[0], better, value[1], value[2], unit=unit, seeds=a.seeds, **more)


def name_of_verdicts(contrasts: Sequence[Contrast]) -> dict[str, list[str]]:
    """Verdict -> the methods that got it."""
    groups: dict[str, list[str]] = {}
    for c in contrasts:
        groups.setdefault(c.verdict, []).append(c.name.removesuffix(" (dev)"))
    return groups
