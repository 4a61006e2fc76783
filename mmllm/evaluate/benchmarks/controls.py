"""Controls of a benchmark: other media, no media, and an answer that is always yes, beside the model's figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mmllm.errors import unknown
from mmllm.evaluate.benchmarks.base import YES_NO, Answered, Benchmark, first_clusters
from mmllm.evaluate.tasks import Sample
from mmllm.report.figures import Figure

SHUFFLED, BLIND, ALWAYS_YES = "shuffled", "blind", "always_yes"
KINDS = (SHUFFLED, BLIND, ALWAYS_YES)
WORDS = {SHUFFLED: "other media", BLIND: "no media", ALWAYS_YES: "always yes"}


def control_kinds(control: str | Sequence[str]) -> list[str]:
    """ "shuffled", "none", "shuffled+blind" or a list of names -> names in the order of ``KINDS``.

    Raises:
        UserError: an unknown one.
    """
    asked = [x for x in (control.split("+") if isinstance(control, str) else control) if x != "none"]
    for name in asked:
        if name not in KINDS:
            raise unknown("control", name, [*KINDS, "none"])
    return [k for k in KINDS if k in asked]


def kind_of(sample: Sample) -> str:
    """Which control an asked sample is: "" for the question itself."""
    return (SHUFFLED if sample.media else BLIND) if sample.control else ""


def asked_controls(
    bench: Benchmark, samples: Sequence[Sample], kinds: Sequence[str], clusters: int | None, seed: int
) -> list[Sample]:
    """The control samples that the model has to answer, for the first ``clusters`` of each split."""
    some = first_clusters(samples, clusters)
    return [s for kind in kinds if kind != ALWAYS_YES for s in bench.control(some, seed, kind == BLIND)]


def always_yes(bench: Benchmark, rows: Sequence[Answered]) -> list[Answered]:
    """The yes/no questions among the rows, each answered with yes; nothing is asked."""
    said = "yes" if bench.style.scored else "Yes"
    out = []
    for r in rows:
        if r.sample.choices == YES_NO and not r.sample.control:
            row = Answered(r.sample, said, prompt=r.prompt)
            row.parsed = bench.parse(said, r.sample)
            bench.judge(row)
            out.append(row)
    return out


def add_controls(
    bench: Benchmark, figures: Sequence[Figure], rows: Sequence[Answered], kinds: Sequence[str], main: str | None
) -> None:
    """Fills ``controls`` of every figure: {kind: value, low, high, n}, computed from the control's answers alone.

    Args:
        main: the control whose figures ``Figure.control`` already holds; where it does, that is taken.
    """
    for kind in kinds:
        if kind == ALWAYS_YES:
            some = always_yes(bench, rows)
        else:
            some = [replace(r, sample=replace(r.sample, control=False)) for r in rows if kind_of(r.sample) == kind]
        found = {f.name: f for f in bench.aggregate(some)} if some else {}
        for f in figures:
            told = entry(f, found.get(f.name), kind == main)
            if told:
                f.controls = {**(f.controls or {}), kind: told}


def entry(figure: Figure, found: Figure | None, main: bool) -> dict[str, Any]:
    """One control of one figure; empty when it says nothing about it."""
    if main and figure.control is not None:
        values: Mapping[str, Any] = {"value": figure.control, "low": figure.control_low, "high": figure.control_high}
    elif found is not None and found.value is not None:
        values = {"value": found.value, "low": found.low, "high": found.high}
    else:
        return {}
    return {k: v for k, v in {**values, "n": found.n if found else None}.items() if v is not None}
