"""`mmllm compare`: pairs the answers of two evaluated runs item by item and says which differences are not noise."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmllm.data.records import iter_records
from mmllm.errors import UserError
from mmllm.evaluate.paired import Comparison, compare_aucs, compare_rows, holm_adjusted
from mmllm.report.figures import Figure, number, write_figures

# (task, split, id) of an item.
Key = tuple[str, str, str]
SETTINGS = ("data", "seed", "limit", "styles")
COLUMNS = ("in percent", "A", "B", "A - B", "95 % interval", "n (clusters)", "McNemar p", "p", "p (Holm)", "")
VERDICTS = {"a better": "A better", "b better": "B better", "within noise": "within the noise"}
NAMED = 3


@dataclass(frozen=True)
class Answer:
    """What the comparison needs of one line of a predictions file.

    Attributes:
        asked: question and true answer, by which items of one id are the same item.
        margin: log-probability of yes minus that of no; None where the choices were others.
        kinds: the kinds of question that the item belongs to, such as POPE's; one without a name where there are none.
    """

    cluster: str
    asked: tuple[Any, Any]
    hit: float
    weight: float
    margin: float | None
    kinds: tuple[str, ...]


@dataclass
class Run:
    """One side of the comparison.

    Attributes:
        path: its predictions file.
        answers: without shuffled controls and without the items that calibrate a threshold.
        results: contents of the results.json beside it, None without one.
    """

    path: Path
    answers: dict[Key, Answer]
    results: dict[str, Any] | None


@dataclass
class RunComparison:
    """What :func:`compare_runs` found.

    Attributes:
        lines: one for each task, split, kind of question and measure, Holm-adjusted over all of them.
        notes: what a reader must know, one sentence each.
        left_out: ids by reason ("only in A", "only in B", "asked differently") and "task split".
    """

    a: Run
    b: Run
    lines: list[Comparison]
    notes: list[str]
    left_out: dict[str, dict[str, list[str]]]


def find_predictions(run: str | Path) -> Path:
    """The predictions file of a run folder, of an evaluation folder, or the file itself.

    Raises:
        UserError: there is none.
    """
    path = Path(run)
    for candidate in (path, path / "eval" / "predictions.jsonl", path / "predictions.jsonl"):
        if candidate.is_file():
            return candidate
    if path.is_dir():
        raise UserError("no eval/predictions.jsonl in this folder", path, "run mmllm eval on it first")
    raise UserError("no such run", path, "give a run folder, an evaluation folder or a predictions.jsonl")


def read_run(run: str | Path) -> Run:
    """Reads one side.

    Raises:
        UserError: no predictions, a line that is none, an item twice, or a broken results.json; with file and line.
    """
    path = find_predictions(run)
    answers: dict[Key, Answer] = {}
    for line, row in iter_records(path):
        where = f"{path}:{line}"
        lacking = [k for k in ("task", "split", "id", "hit") if k not in row]
        if lacking:
            raise UserError(f"not a line of mmllm eval, it has no '{lacking[0]}'", where, "give a predictions.jsonl")
        if row.get("control") or row["split"] == "validation":
            continue
        key = (str(row["task"]), str(row["split"]), str(row["id"]))
        if key in answers:
            raise UserError(f"item {' '.join(key)} stands here a second time", where, "give one run's predictions")
        answers[key] = _answer(row, where)
    return Run(path, answers, _results(path.parent / "results.json"))


def _answer(row: dict[str, Any], where: str) -> Answer:
    # Lines of older versions have no cluster, and their media stand for it.
    cluster = row.get("cluster", "|".join(map(str, row.get("media") or ())))
    if not cluster:
        raise UserError("the line has neither 'cluster' nor 'media'", where, "evaluate again")
    choices, scores, margin = row.get("choices"), row.get("scores"), None
    if scores is not None and choices in (["yes", "no"], ["no", "yes"]):
        if not isinstance(scores, list) or len(scores) != 2:
            raise UserError("'scores' is no list of 2 numbers", where)
        yes, no = (_finite(scores[choices.index(x)], "scores", where) for x in ("yes", "no"))
        margin = yes - no
    hit, weight = (_finite(row.get(k, 1.0), k, where) for k in ("hit", "weight"))
    kinds = tuple((row.get("meta") or {}).get("kinds") or [""])
    return Answer(str(cluster), (row.get("question"), row.get("gold")), hit, weight, margin, kinds)


def _finite(value: Any, name: str, where: str) -> float:
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"'{name}' is no number: {value!r}", where)
    return float(value)


def _results(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        found = None
    if not isinstance(found, dict):
        raise UserError("not a results file", path, "evaluate again")
    return found


def compare_runs(run_a: str | Path, run_b: str | Path, seed: int = 0) -> RunComparison:
    """Compares the answers that both runs gave to the same questions.

    Each task and split (and each kind of question in it, since only the kinds of POPE are balanced, not their union)
    gives one line on its hits (accuracy, or the pooled ratio of hits where they have weights), and another on the AUC
    of the yes-no margin where both runs have scores of yes and no. Items of one id whose question, true answer or
    kinds differ between the runs are left out, as are those that only one run has.

    Args:
        run_a, run_b: see :func:`find_predictions`.
        seed: of the resamples and sign flips.

    Raises:
        UserError: see :func:`read_run`; also when the runs have no item in common.
    """
    a, b = read_run(run_a), read_run(run_b)
    common = [k for k in a.answers if k in b.answers]
    kinds = {k: _kinds(a.answers[k], b.answers[k]) for k in common}
    left_out = {
        "only in A": _by_group(a.answers.keys() - b.answers.keys()),
        "only in B": _by_group(b.answers.keys() - a.answers.keys()),
        "asked differently": _by_group({k for k in common if not kinds[k]}),
    }
    groups: dict[str, list[tuple[Answer, Answer]]] = defaultdict(list)
    for key in common:
        for kind in kinds[key]:
            groups["_".join(filter(None, (*key[:2], kind)))].append((a.answers[key], b.answers[key]))
    if not groups:
        raise UserError("these runs have no item in common", f"{a.path}, {b.path}", "evaluate both on the same data")
    lines = [c for group, pairs in groups.items() for c in _lines(group, pairs, seed)]
    notes = [
        f"p lets whole clusters (pictures, recordings) change sides; Holm over {len(lines)} lines; McNemar's p takes "
        "every question as independent",
        *_setting_notes(a, b),
        *_left_out_notes(left_out),
    ]
    return RunComparison(a, b, holm_adjusted(lines), notes, left_out)


def _kinds(x: Answer, y: Answer) -> list[str]:
    """The kinds under which both runs asked the same; none when they asked something else."""
    return [k for k in x.kinds if k in y.kinds] if x.asked == y.asked else []


def _by_group(keys: set[Key]) -> dict[str, list[str]]:
    out: dict[str, list[str]] = defaultdict(list)
    for task, split, item in sorted(keys):
        out[f"{task} {split}"].append(item)
    return dict(out)


def _lines(group: str, pairs: list[tuple[Answer, Answer]], seed: int) -> list[Comparison]:
    clusters = [x.cluster for x, _ in pairs]
    hits_a, hits_b = ([y.hit for y in side] for side in zip(*pairs, strict=True))
    weights_a, weights_b = ([y.weight for y in side] for side in zip(*pairs, strict=True))
    binary = {0.0, 1.0}.issuperset(hits_a + hits_b)
    plain = "accuracy" if binary else "mean_score"
    name = f"{group}_{plain if set(weights_a + weights_b) == {1.0} else 'hit_ratio'}"
    lines = [compare_rows(name, hits_a, hits_b, clusters, weights_a, weights_b, seed=seed)]
    margins = [(x.margin, y.margin) for x, y in pairs if x.margin is not None and y.margin is not None]
    labels = [x.asked[1] == "yes" for x, _ in pairs]
    if len(margins) == len(pairs) and len(set(labels)) == 2:
        margins_a, margins_b = zip(*margins, strict=True)
        lines.append(compare_aucs(f"{group}_auc", margins_a, margins_b, labels, clusters, seed))
    return lines


def _setting_notes(a: Run, b: Run) -> list[str]:
    unknown = [side for side, run in (("A", a), ("B", b)) if run.results is None]
    if unknown:
        return [f"no results.json beside the predictions of {' and '.join(unknown)}: data, seed and limit not compared"]
    assert a.results is not None and b.results is not None
    pairs = [(k, a.results.get(k), b.results.get(k)) for k in SETTINGS]
    told = [f"{k} {_said(x)} and {_said(y)}" for k, x, y in pairs if x != y]
    return [f"the runs were evaluated differently (A and B): {'; '.join(told)}"] if told else []


def _said(value: Any) -> str:
    return "none" if value is None else str(value)


def _left_out_notes(left_out: dict[str, dict[str, list[str]]]) -> list[str]:
    notes = []
    for reason, groups in left_out.items():
        for group, ids in groups.items():
            names = ", ".join(ids[:NAMED]) + (", ..." if len(ids) > NAMED else "")
            notes.append(f"{group}: {len(ids)} {'item' if len(ids) == 1 else 'items'} {reason}: {names}")
    return notes


def table_rows(lines: list[Comparison]) -> list[tuple[str, ...]]:
    """One row of strings per line of a comparison; columns as in ``COLUMNS``, names in words that can be wrapped."""
    rows = []
    for c in lines:
        known = c.to_dict()
        values = (number(known[k]).removesuffix(" %") for k in ("value_a", "value_b", "difference"))
        interval = "" if known["low"] is None else f"{100 * c.low:.1f} … {100 * c.high:.1f}"
        tests = (p_value(known[k]) for k in ("mcnemar", "p", "p_adjusted"))
        rows.append((c.name.replace("_", " "), *values, interval, f"{c.n} ({c.clusters})", *tests, VERDICTS[c.verdict]))
    return rows


def p_value(p: float | None) -> str:
    """Three decimals, "<0.001" below that, nothing for None."""
    if p is None:
        return ""
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def write_comparison(path: str | Path, found: RunComparison, command: str, seed: int) -> Path:
    """Writes the differences as figures, and beside them every line in full and the ids that were left out."""
    records = [c.to_dict() for c in found.lines]
    figures = [
        Figure(f"{c.name}_difference", c.difference, c.better, c.low, c.high, c.n, "fraction",
               verdict=VERDICTS[c.verdict], arms={"a": known["value_a"], "b": known["value_b"]},
               note=f"A minus B, {c.clusters} clusters, Holm-adjusted p {p_value(known['p_adjusted']) or 'unknown'}")
        for c, known in zip(found.lines, records, strict=True)
    ]  # fmt: skip
    extra = {
        "a": str(found.a.path), "b": str(found.b.path), "notes": found.notes, "left_out": found.left_out,
        "comparisons": records,
    }  # fmt: skip
    sources = (found.a.results or {}).get("sources")
    return write_figures(path, command, seed, None, sources, figures, **extra)
