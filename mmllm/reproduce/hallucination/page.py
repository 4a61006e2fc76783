"""docs/hallucination.md: what was found, for people; every number in it is also in the JSON beside it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from mmllm.evaluate.paired import PairedDifference
from mmllm.report.figures import machine, write_figures
from mmllm.reproduce.hallucination import questions as q
from mmllm.reproduce.hallucination.analysis import Analysis, analyse, figures_of, name_of_verdicts, show_p
from mmllm.reproduce.hallucination.captions import MEASURES
from mmllm.reproduce.hallucination.conditions import BASE, BIAS, DRAWN, RULES
from mmllm.reproduce.hallucination.measures import Interval
from mmllm.reproduce.hallucination.run import Findings

NAME = "hallucination"
CLAIM = "reduces hallucination"
INTRODUCTION = """\
# Does decoding reduce hallucination?

Written by `{command}`; every number is also in `hallucination.json`. A small model (SmolLM2-135M with
EfficientNet-Lite0) is trained on scenes in which a thing A nearly always comes with its partner B, which is hard to
see. Does it see B where there is none, and does a decoding method keep it from doing so?
"""
CHECK = """\
## Did the bias take?

{verdict} Greedy, before any method was run, in percent:

{table}"""
POWER = """\
## What this run could notice

With a chance of 80 %: a difference in AUC of {auc} points or more (from the widest interval of the comparisons below),
and {gain} by McNemar's test ({questions} questions on {pictures} pictures a training seed, {discordance} % of the
answers change, design effect {design}). Smaller effects may exist: a null result does not exclude them.
"""
TEST = """\
## The test

Settings chosen on dev pictures, run once on the test pictures at T = 0: POPE-adversarial on twins. Differences from
greedy in points, with 95 % intervals over {over}.

{table}"""
EVERY = """\
## Every condition

POPE-adversarial on twins unless said otherwise, in percent; exploratory but for the rows (dev). "Accuracy, drawn" is
the expected accuracy of answers drawn at T = 1: what helps there and not at T = 0 only sharpens the distribution.
Accuracy up with AUC flat is a leaning, not sight. "Bias" is the difference of the check above.

{table}"""
SAMPLED = """\
## Drawn answers

Expected accuracy, POPE-adversarial on twins, in percent. A gain over drawing at T = 1 counts for nothing unless it
exceeds that of the plausibility mask alone and of a lower temperature.

{table}
Methods at T = 1, with the settings chosen on dev; differences in points:

{methods}"""
CAPTIONS = """\
## Captions

In percent. CHAIR_i: mentions of things that are not there; CHAIR_s: captions with one; partners: share of those
mentions that are the planted partner of a thing that is there; repetition: trigrams said before.

{table}"""
SETUP = """\
## How it was done

`{command}`, size {size}, data seed {seed}, {seeds} training seed(s); {cores} cores of {cpu}; {minutes} minutes of work
in all. Minutes by stage: {stages}.

{train:,} training scenes of {labels} things, {side} pixels; planted pairs: {pairs}. P(B | A) = {together:g},
P(B | no A) = {stray:g}, the background of A with {tied:g}; B is {small:.0f} to {large:.0f} % of the side and
{opacity:.0f} % opaque, in training and in test. The cut-outs of training, dev and test are disjoint. {twins} pairs of
twins, {natural} natural and {swapped} swapped scenes are judged, the same for all conditions. Captions are at most
{tokens} tokens long and use the settings chosen for yes and no. Beam search and CIDEr-D are left out.

The size `full` (`configs/effects/hallucination.yaml`: 20 pairs of 72 things, 3 training seeds, 500 scenes a set) takes
some 14 hours on two such cores, estimated by the rates of `smoke`; the same command goes on where it was stopped.
"""


def percent(value: Interval) -> str:
    """A fraction and its interval in percent."""
    return "" if math.isnan(value[0]) else f"{100 * value[0]:.1f} ({100 * value[1]:.1f} … {100 * value[2]:.1f})"


def points(gap: PairedDifference) -> str:
    """A difference and its interval in points."""
    if math.isnan(gap.difference):
        return ""
    return f"{100 * gap.difference:+.1f} ({100 * gap.low:+.1f} … {100 * gap.high:+.1f})"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, the first column left and the others right."""
    lines = [f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def answer(a: Analysis) -> str:
    """The finding in one paragraph."""
    if not a.found.took:
        return (
            f"**The bias did not take**: greedy says yes to an absent B {100 * a.bias[0]:.1f} points more often beside "
            f"its A; more than {100 * BIAS:.0f} are needed. This says nothing about decoding; nothing was compared.\n"
        )
    groups = name_of_verdicts(a.confirmed)
    count, claimed = len(a.confirmed), len(groups.get(CLAIM, []))
    first = f"**{claimed} of {count} methods reduce hallucination here**, by the rules below."
    if not claimed:
        first = f"**None of the {count} methods is shown to reduce hallucination here**, by the rules below."
    said = [f"{verdict[:1].upper()}{verdict[1:]}: {'; '.join(names)}." for verdict, names in groups.items()]
    return " ".join([first, *said]) + "\n"


def check_section(a: Analysis) -> str:
    """The manipulation check and how well the model sees at all."""
    bench, base = a.found.bench, a.found.check
    (own, other), yes = bench.gaps, base.yes()
    beside, elsewhere = (bench.mean((yes[:, part], bench.clusters[part])) for part in (own, other))
    rows = [
        ("false yes about an absent B, its A in the picture", percent(beside)),
        ("false yes about an absent B, its A not there either", percent(elsewhere)),
        ("difference, in points", percent(a.bias)),
        ("twins both answered right", percent(bench.mean(bench.pairs(base)))),
        ("yes about present things in no pair", percent(bench.mean(bench.recall(base, clean=True)))),
        ("AUC, POPE-adversarial, twins", percent(bench.auc(base, q.ADVERSARIAL))),
        ("AUC, POPE-random, natural scenes", percent(bench.auc(base, q.NATURAL[0]))),
    ]
    verdict = "The bias took." if a.found.took else "The bias did not take."
    return CHECK.format(verdict=verdict, table=table(("", "%"), rows))


def power_section(a: Analysis) -> str:
    """What a null result here is worth."""
    p = a.power
    if p is None:
        return ""
    gain = (
        "no gain in accuracy however large, since too few answers change,"
        if math.isnan(p.accuracy)
        else f"a gain of {100 * p.accuracy:.1f} points or more in accuracy"
    )
    return POWER.format(auc=f"{100 * p.auc:.1f}", gain=gain, questions=p.questions, pictures=p.pictures,
                        discordance=f"{100 * p.discordance:.1f}", design=f"{p.design:.2f}")  # fmt: skip


def test_section(a: Analysis) -> str:
    """The confirmatory comparisons."""
    rows = []
    for c in a.confirmed:
        judged = a.found.judged[c.name]
        captions = "" if c.caption_recall is None else f"{100 * c.caption_recall:+.1f}"
        rows.append((f"`{judged.spec}`", percent(a.found.bench.auc(judged, q.ADVERSARIAL)), points(c.auc),
                     show_p(c.p_adjusted), points(c.pairs), points(c.recall), captions, c.verdict))  # fmt: skip
    head = ("setting", "AUC", "AUC, difference", "p (Holm)", "twins right", "recall", "caption recall", "verdict")
    over = "pictures and training seeds" if len(a.seeds) > 1 else "pictures"
    return TEST.format(over=over, table=table(head, rows)) if rows else ""


def every_section(a: Analysis) -> str:
    """One row per condition."""
    bench, rows = a.found.bench, []
    contrasts = {**a.explored, **{c.name: c for c in a.confirmed}}
    for name, judged in a.found.judged.items():
        pick = bench.use(q.ADVERSARIAL)
        means = [
            bench.mean(bench.right(judged, q.ADVERSARIAL))[0],
            bench.mean(bench.right(judged, q.ADVERSARIAL, 1.0))[0],
            float(judged.yes()[:, pick].mean()),
            bench.mean(bench.pairs(judged))[0],
        ]
        gap = points(contrasts[name].auc) if name in contrasts else ""
        rows.append((name, judged.kind, percent(bench.auc(judged, q.ADVERSARIAL)), gap,
                     *(f"{100 * x:.1f}" for x in means), percent(bench.mean(bench.bias(judged))),
                     *(f"{100 * bench.auc(judged, use)[0]:.1f}" for use in (q.NATURAL[2], q.SWAPPED))))  # fmt: skip
    head = ("condition", "kind", "AUC", "AUC, difference", "accuracy", "accuracy, drawn", "yes", "twins right", "bias",
            "AUC, natural", "AUC, swapped")  # fmt: skip
    return EVERY.format(table=table(head, rows))


def sampled_section(a: Analysis) -> str:
    """What drawn answers gain, beside the mask alone and a lower temperature."""
    bench = a.found.bench
    rows = [(f"{BASE}, not drawn", percent(bench.mean(bench.right(a.base, q.ADVERSARIAL))))]
    drawn = [j for j in a.found.judged.values() if j.temperature]
    rows += [(j.name, percent(bench.mean(bench.right(j, q.ADVERSARIAL)))) for j in drawn]
    methods = []
    for d in a.drawn:
        right = bench.mean(bench.right(a.found.judged[d.name], q.ADVERSARIAL, 1.0))
        methods.append((d.name, percent(right), *(points(gap) for gap in d.over.values()), d.verdict))
    over = [f"over {name}" for name in DRAWN]
    return SAMPLED.format(table=table(("condition", "accuracy"), rows),
                          methods=table(("method", "accuracy", *over, "verdict"), methods))  # fmt: skip


def caption_section(a: Analysis) -> str:
    """CHAIR with recall, length and repetition."""
    if not a.found.captions:
        return ""
    rows = []
    for name, counts in a.found.captions.items():
        values = {m: counts.interval(m) for m in MEASURES}
        cells = [percent(values[m]) for m in ("chair_i", "chair_s", "recall", "partner_share")]
        rows.append((name, *cells, f"{values['tokens'][0]:.1f}", f"{100 * values['repetition'][0]:.1f}"))
    head = ("condition", "CHAIR_i", "CHAIR_s", "recall", "partners", "tokens", "repetition")
    return CAPTIONS.format(table=table(head, rows))


def setup_section(a: Analysis, size: str, command: str, wall: float) -> str:
    """Sizes, seeds, machine and time."""
    plan, where = a.found.plan.data, machine()
    s = plan.scene
    return SETUP.format(
        command=command, size=size, seed=plan.seed, seeds=len(a.seeds), cores=where["cores"], cpu=where["cpu"],
        minutes=f"{wall / 60:.1f}", stages=", ".join(f"{k} {v / 60:.1f}" for k, v in a.found.stages.items()),
        train=plan.train, labels=len(a.found.prior.labels), side=s.size,
        pairs=", ".join(f"{x} → {y}" for x, y in a.found.prior.pairs), together=s.together, stray=s.stray, tied=s.tied,
        tokens=a.found.plan.max_new_tokens,
        small=100 * s.weak_smallest, large=100 * s.weak_largest, opacity=100 * s.weak_opacity, twins=plan.twins,
        natural=plan.natural, swapped=plan.swapped,
    )  # fmt: skip


def page(a: Analysis, size: str, command: str, wall: float) -> str:
    """The whole report in Markdown."""
    parts = [INTRODUCTION.format(command=command), answer(a), check_section(a)]
    if a.found.took:
        parts += [power_section(a), test_section(a), every_section(a), sampled_section(a), caption_section(a)]
    rules = "\n".join(f"- {rule}" for rule in RULES)
    parts += [f"## The rules, written before any result\n\n{rules}\n", setup_section(a, size, command, wall)]
    return "\n".join(filter(None, parts))


def write_report(found: Findings, folder: Path, size: str, command: str) -> Path:
    """Writes ``hallucination.md`` and ``hallucination.json`` into ``folder``; returns the page's path."""
    a = analyse(found)
    wall = sum(found.stages.values())
    extra = {"size": size, "chosen": found.chosen, "stage_seconds": found.stages, "rules": list(RULES)}
    figures = figures_of(a, wall)
    write_figures(folder / f"{NAME}.json", command, found.plan.data.seed, None, found.sources, figures, **extra)
    path = folder / f"{NAME}.md"
    path.write_text(page(a, size, command, wall), encoding="utf-8")
    return path
