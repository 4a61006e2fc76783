"""`mmllm eval --tasks mme,pope --data DIR`: asks what was not asked before, parses, judges, and writes the results."""

from __future__ import annotations

import json
import math
import os
import re
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmllm.errors import UserError
from mmllm.evaluate.answer import GENERATE_PORTION, SCORE_PORTION, Progress, load_decoder, media_portions
from mmllm.evaluate.benchmarks import get_benchmark
from mmllm.evaluate.benchmarks.answers import AnswerStore, Given, Key, question_id, weights_id
from mmllm.evaluate.benchmarks.base import YES_NO, Answered, Benchmark, split_of
from mmllm.evaluate.benchmarks.controls import ALWAYS_YES, BLIND, add_controls, asked_controls, control_kinds, kind_of
from mmllm.evaluate.benchmarks.scores import unparsed_figure
from mmllm.evaluate.page import write_eval_report
from mmllm.evaluate.tasks import Sample
from mmllm.report.figures import Figure, read_figures, write_figures

CONTROL_CLUSTERS = 80
# How a choice may be said; the more probable spellings count together.
SPOKEN = {"yes": ("Yes", "yes"), "no": ("No", "no")}


@dataclass
class Question:
    """One thing to ask, and everybody who waits for its answer.

    Attributes:
        waiting: the items with this very question, such as those that several splits of POPE share.
        given: what is known of the answer. generate, score: what is still to be done for it.
    """

    benchmark: Benchmark
    sample: Sample
    asked: str
    waiting: list[Key]
    given: Given
    generate: bool
    score: bool


def run_benchmarks(
    model_path: str | Path | None,
    data: str | Path,
    tasks: Sequence[str],
    style: str | Mapping[str, str | None] | None = None,
    decode: str = "greedy",
    limit: int | None = None,
    out: str | Path | None = None,
    control: str | Sequence[str] = "shuffled",
    seed: int = 0,
    margins: bool = True,
    control_clusters: int | None = CONTROL_CLUSTERS,
    decoder: Any = None,
    command: str = "mmllm eval",
) -> list[Figure]:
    """Evaluates a model on benchmarks in their official layout.

    Writes ``answers.jsonl`` as it goes (an interrupted run goes on from it; with all answers there the model is not
    even loaded), then ``predictions.jsonl`` (prompt, answer, parsed answer, truth, margin), ``results.json``
    and ``report.html``.
    Figures of other tasks that the folder already has stay in ``results.json``.

    Args:
        data: folder with one folder per benchmark, or the folder of the one benchmark.
        tasks: names of benchmarks.
        style: for all of them, or by name; None takes each one's first.
        out: default ``bench/STYLE_DECODE`` in the model's folder.
        control: ``shuffled`` (the media of another cluster), ``blind`` (no media), both asked for the first
            ``control_clusters`` of each split, ``always_yes`` (a fixed answer to every yes/no question); several as a
            list or ``shuffled+blind``; or ``none``. The first of them but always_yes is the figures' ``control``.
        margins: also score the choices of closed questions, for the AUC.
        decoder: anything with the decoder's ``score`` and ``generate``; made from ``model_path`` when absent.

    Raises:
        UserError: unknown task, style or decoding method, missing files, a folder of another model or style.
    """
    from mmllm.decode import parse_spec

    start = time.monotonic()
    spec = str(parse_spec(decode))
    classes = {name: get_benchmark(name) for name in dict.fromkeys(tasks)}
    if not classes:
        raise UserError("no task given", "--tasks", "name at least one benchmark")
    if out is None and model_path is None:
        raise UserError("nowhere to write to", "--out", "give a folder")
    kinds = control_kinds(control)
    slug = re.sub(r"\W+", "_", f"{style if isinstance(style, str) else 'default'}_{spec}").strip("_")
    folder = Path(out) if out is not None else Path(str(model_path)) / "bench" / slug
    styles = style if isinstance(style, Mapping) else dict.fromkeys(classes, style)
    benchmarks = [cls(data, styles.get(name), seed, folder) for name, cls in classes.items()]
    asked = {b.name: b.samples(limit) for b in benchmarks}
    model = None if model_path is None else str(model_path)
    identity = {"model": model, "weights": weights_id(model) if model else None, "decode": spec, "seed": seed,
                "styles": {b.name: b.style_name for b in benchmarks}}  # fmt: skip
    store = AnswerStore(folder, identity)
    for b in benchmarks:
        asked[b.name] += asked_controls(b, asked[b.name], kinds, control_clusters, seed)
    questions = open_questions(benchmarks, asked, store, margins)
    if questions:
        ask(decoder if decoder is not None else load_decoder(model_path), questions, store, spec, seed)
    rows = {b.name: [judged(b, s, store) for s in asked[b.name]] for b in benchmarks}
    found = {b.name: figures_of(b, rows[b.name], kinds) for b in benchmarks}
    write_rows(folder / "predictions.jsonl", rows)
    told = {b.name: about(b, rows[b.name], found[b.name]) for b in benchmarks}
    extra = {k: identity[k] for k in ("model", "weights", "decode")}
    extra |= {"data": str(data), "limit": limit, "control": "+".join(kinds) or "none"}
    extra |= {"seconds": round(time.monotonic() - start, 1)}
    figures = write_results(folder / "results.json", found, told, command, seed, extra)
    write_eval_report(folder)
    return figures


def key_of(benchmark: Benchmark, sample: Sample) -> Key:
    return benchmark.name, split_of(sample), sample.id, kind_of(sample)


def question_of(benchmark: Benchmark, sample: Sample) -> str:
    return question_id(benchmark.words(sample), sample.media, sample.choices, benchmark.style.max_new_tokens)


def open_questions(
    benchmarks: Sequence[Benchmark], asked: dict[str, list[Sample]], store: AnswerStore, margins: bool
) -> list[Question]:
    """What is still to be asked; items of one benchmark with the same words, media and choices are one question."""
    found: dict[tuple[Any, ...], Question] = {}
    for b in benchmarks:
        for s in asked[b.name]:
            asked_id = question_of(b, s)
            given = store.get(key_of(b, s), asked_id) or Given(None)
            generate = given.answer is None and not b.style.scored
            score = bool(s.choices) and given.scores is None and (margins or b.style.scored)
            if generate or score:
                whole = (b.name, asked_id, tuple(s.media), given.answer)
                question = found.setdefault(whole, Question(b, s, asked_id, [], given, generate, score))
                question.waiting.append(key_of(b, s))
    return list(found.values())


def ask(decoder: Any, questions: Sequence[Question], store: AnswerStore, decode: str, seed: int) -> None:
    """Answers all questions, each stored as soon as its portion is done; those on the same media stand together."""
    from mmllm.decode import Request

    def request(q: Question) -> Any:
        salt = zlib.crc32("|".join(Path(m).name for m in q.sample.media).encode()) ^ seed
        limit = max(q.benchmark.style.max_new_tokens, 1)
        return Request(q.benchmark.prompt(q.sample), decode, max_new_tokens=limit, seed=salt)

    free = [q for q in questions if q.generate]
    free.sort(key=lambda q: (q.benchmark.style.max_new_tokens, q.sample.media))
    closed = sorted((q for q in questions if q.score), key=lambda q: (q.sample.kind, q.sample.media))
    progress = Progress(len(free) + len(closed))
    for start in range(0, len(free), GENERATE_PORTION):
        portion = free[start : start + GENERATE_PORTION]
        for q, result in zip(portion, decoder.generate([request(q) for q in portion]), strict=True):
            q.given = Given(result.text, q.given.scores)
        store.add([(key, q.asked, q.given) for q in portion for key in q.waiting])
        progress.add(len(portion))
    for portion in media_portions(closed, SCORE_PORTION, lambda q: q.sample.media):
        score_portion(decoder, portion, request)  # type: ignore[arg-type]
        store.add([(key, q.asked, q.given) for q in portion for key in q.waiting])  # type: ignore[attr-defined]
        progress.add(len(portion))


def score_portion(decoder: Any, portion: Sequence[Question], request: Any) -> None:
    """Fills ``given.scores`` with one log-probability per choice; spellings of one choice are added up."""
    spoken = [[SPOKEN.get(c, (c,)) if q.sample.choices == YES_NO else (c,) for c in q.sample.choices or ()]
              for q in portion]  # fmt: skip
    results = decoder.score([request(q) for q in portion], [[x for forms in each for x in forms] for each in spoken])
    for q, forms, scores in zip(portion, spoken, results, strict=True):
        places = iter(scores)
        q.given = Given(q.given.answer, [log_sum([float(next(places)) for _ in each]) for each in forms])


def log_sum(values: Sequence[float]) -> float:
    top = max(values)
    return top + math.log(sum(math.exp(v - top) for v in values))


def judged(benchmark: Benchmark, sample: Sample, store: AnswerStore) -> Answered:
    """The row of a sample whose answer is there; parsing it anew each time makes a mended parser count at once."""
    given = store.get(key_of(benchmark, sample), question_of(benchmark, sample))
    assert given is not None
    answer = given.answer or ""
    if benchmark.style.scored and given.scores and sample.choices:
        answer = sample.choices[max(range(len(given.scores)), key=given.scores.__getitem__)]
    row = Answered(sample, answer, given.scores, prompt=benchmark.words(sample))
    row.parsed = benchmark.parse(answer, sample)
    benchmark.judge(row)
    return row


def figures_of(benchmark: Benchmark, rows: Sequence[Answered], kinds: Sequence[str] = ()) -> list[Figure]:
    """All figures of a benchmark with their controls; the share of answers that no rule accepted stands among them."""
    main = next((k for k in kinds if k != ALWAYS_YES), None)
    figures = benchmark.aggregate([r for r in rows if kind_of(r.sample) in ("", main)])
    if main == BLIND:
        for f in figures:
            f.name = f.name.replace("_over_shuffled", "_over_blind")
            if f.name.endswith("_over_blind"):
                f.note = "paired difference to the control without media"
            elif f.control is not None:
                f.note = "; ".join(filter(None, (f.note, "control: no media")))
    if benchmark.parses:
        figures.append(unparsed_figure(benchmark.name, rows))
    add_controls(benchmark, figures, rows, kinds, main)
    if figures and benchmark.style.note:
        figures[0].note = "; ".join(filter(None, (figures[0].note, benchmark.style.note)))
    return figures


def about(benchmark: Benchmark, rows: Sequence[Answered], figures: Sequence[Figure]) -> dict[str, Any]:
    """What results.json says about a task beside its figures."""
    real = [r for r in rows if not r.sample.control]
    return {
        "style": benchmark.style_name, "note": benchmark.style.note,
        "max_new_tokens": benchmark.style.max_new_tokens, "items": len(real),
        "unparsed": sum(r.parsed is None for r in real), "media_left_out": benchmark.lacking,
        "figures": [f.name for f in figures],
    }  # fmt: skip


def write_rows(path: Path, rows: dict[str, list[Answered]]) -> None:
    """predictions.jsonl; lines of tasks that were not asked this time stay."""
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as f:
        if path.is_file():
            with path.open(encoding="utf-8") as old:
                f.writelines(line for line in old if json.loads(line)["task"] not in rows)
        for task, some in rows.items():
            f.writelines(json.dumps(r.to_dict(task), ensure_ascii=False) + "\n" for r in some)
    os.replace(part, path)


def write_results(
    path: Path, found: dict[str, list[Figure]], told: dict[str, Any], command: str, seed: int, extra: dict[str, Any]
) -> list[Figure]:
    """results.json: these figures, and those of other tasks that it had before; returns these."""
    kept, tasks = [], {}
    if path.is_file():
        tasks = {k: v for k, v in json.loads(path.read_text(encoding="utf-8"))["tasks"].items() if k not in found}
        names = {n for t in tasks.values() for n in t["figures"]}
        kept = [f for f in read_figures(path) if f.name in names]
    figures = [f for some in found.values() for f in some]
    extra["styles"] = {k: v["style"] for k, v in {**tasks, **told}.items()}
    write_figures(path, command, seed, None, [], [*kept, *figures], **extra, tasks={**tasks, **told})
    return figures
