"""`mmllm eval`: asks a model every question of the chosen tasks, with controls, and writes figures and predictions."""

from __future__ import annotations

import json
import os
import re
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mmllm.errors import UserError, unknown
from mmllm.evaluate.answer import Asked, Progress, Trace, answer, answer_in_processes, load_decoder, trace
from mmllm.evaluate.page import write_eval_report
from mmllm.evaluate.tasks import EvalData, EvalTask, Row, Sample, take_clusters, without_media
from mmllm.registry import get, names
from mmllm.report.figures import Figure, write_figures

CONTROL_CLUSTERS = 80


@dataclass
class Job:
    """One sample on its way through the decoder."""

    task: EvalTask
    sample: Sample
    calibration: bool = False
    decode: str = "greedy"
    row: Row | None = None


def task_names() -> list[str]:
    """All tasks: those on the multimodal LLM, and ``retrieval`` on an align run."""
    from mmllm.evaluate import chair, grounding, hearing, pope  # noqa: F401  (they register their tasks)

    return [*names("task"), "retrieval"]


def make_jobs(
    tasks: Sequence[EvalTask],
    shuffled: bool,
    control_clusters: int | None,
    seed: int,
    blind: bool = False,
    decode: str = "greedy",
) -> list[Job]:
    """Every sample of every task; shuffled ones for the first clusters; calibration samples once per kind of task."""
    jobs: list[Job] = []
    calibrated: set[type] = set()
    for task in tasks:
        samples = task.samples()
        jobs += [Job(task, s) for s in samples]
        if shuffled:
            jobs += [Job(task, s) for s in task.control(take_clusters(samples, control_clusters), seed)]
        if blind:
            jobs += [Job(task, without_media(s)) for s in samples]  # cheap: no media
        if type(task) not in calibrated:
            calibrated.add(type(task))
            jobs += [Job(task, s, calibration=True) for s in task.calibration_samples()]
    for job in jobs:
        job.decode = decode
    return jobs


def answer_jobs(
    jobs: Sequence[Job],
    seed: int,
    decoder: Any = None,
    model: str | Path | None = None,
    nproc: int = 1,
    traced: Sequence[Asked] = (),
) -> list[Trace]:
    """Fills ``job.row`` of every job, by the decoder or, in ``nproc`` processes, by copies of the model.

    Returns:
        how the answers to the questions ``traced`` came about; nothing where there is no question or no real decoder.

    What two jobs ask alike (a caption of picture j is also the control of the picture that j stands in for) is asked
    once.
    """
    asked: dict[str, Asked] = {}
    keys = []
    for job in jobs:
        # One seed per media: all questions on a picture then share the views that noise makes of it.
        salt = zlib.crc32("|".join(job.sample.media).encode()) ^ seed
        s, task = job.sample, job.task
        one = Asked(task.prompt(s), s.media, s.kind, s.choices, task.max_new_tokens, salt, job.decode)
        keys.append(repr(one))
        asked.setdefault(keys[-1], one)
    questions = list(asked.values())
    if nproc > 1 and model is not None:
        answers, steps = answer_in_processes(model, questions, nproc, traced)
    else:
        answers = answer(decoder, questions, Progress(len(questions)).at)
        steps = trace(decoder, traced) if traced and can_trace(decoder) else []
    found = dict(zip(asked, answers, strict=True))
    for job, key in zip(jobs, keys, strict=True):
        text, scores = found[key]
        job.row = Row(job.sample, text, scores)
        job.task.judge(job.row)
    return steps


def finish(tasks: Sequence[EvalTask], jobs: Sequence[Job]) -> list[Figure]:
    """Calibrates on the calibration rows, then collects the figures of every task."""
    figures: list[Figure] = []
    for task in tasks:
        task.calibrate([j.row for j in jobs if j.calibration and type(j.task) is type(task) and j.row])
        rows = [j.row for j in jobs if j.task is task and not j.calibration and j.row]
        if rows:
            figures += with_blind(task, rows)
    return figures


def with_blind(task: EvalTask, rows: Sequence[Row]) -> list[Figure]:
    """A task's figures; where it was also asked without media, each with that control, and ``NAME_over_blind``, the
    paired difference to it."""
    blind = [r for r in rows if r.sample.control and not r.sample.media]
    figures = task.aggregate([r for r in rows if r.sample.media])
    if not blind:
        return figures
    # To the task it is a control like the other: what it says about that one, it now says about this one.
    found = {f.name: f for f in task.aggregate([r for r in rows if not r.sample.control] + blind)}
    for f in figures:
        other = found.get(f.name)
        if other is not None and other.control is not None:
            entry = {"value": other.control, "low": other.control_low, "high": other.control_high}
            f.controls = {**(f.controls or {}), "blind": entry}
    for f in found.values():
        if f.name.endswith("_over_shuffled"):
            f.name, f.note = f.name.replace("_over_shuffled", "_over_blind"), "paired difference to no media"
            figures.append(f)
    return figures


def judge_margins(figures: Sequence[Figure], model_path: str | Path | None) -> None:
    """Compares what a run gains over its blind control with the ``margins`` that its config states."""
    file = Path(str(model_path)) / "config.yaml"
    stated = (yaml.safe_load(file.read_text(encoding="utf-8")) or {}).get("margins") if file.is_file() else None
    for f in figures:
        name = f.name.removesuffix("_over_blind")
        if f.name.endswith("_over_blind") and name in (stated or {}):
            f.target = float((stated or {})[name])
            f.verdict = "met" if f.value is not None and f.value >= f.target else "missed"


def write_predictions(path: Path, jobs: Sequence[Job]) -> None:
    """predictions.jsonl: every answer with question, truth and scores, controls and calibration included."""
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as f:
        for job in jobs:
            assert job.row is not None
            line = job.row.to_dict(task_name(job.task))
            line["split"] = "validation" if job.calibration else job.task.split
            f.write(json.dumps(line, ensure_ascii=False) + "\n")
    os.replace(part, path)


def can_trace(decoder: Any) -> bool:
    from mmllm.decode import Decoder

    return isinstance(decoder, Decoder)


def to_trace(job: Job, seed: int) -> Asked:
    """A job's question, for the trace of its answer."""
    return Asked(job.task.prompt(job.sample), job.sample.media, max_new_tokens=8, seed=seed, decode=job.decode)


def write_trace(path: Path, job: Job, steps: Trace) -> None:
    """trace.json: how a method other than greedy came to its answer to the first question, token by token."""
    found = {"decode": job.decode, "question": job.sample.question, "media": job.sample.media, "steps": steps}
    path.write_text(json.dumps(found, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def task_name(task: EvalTask) -> str:
    return next(n for n in names("task") if get("task", n) is type(task))


def check_tasks(tasks: Sequence[str]) -> list[str]:
    """The asked task names without repeats.

    Raises:
        UserError: an unknown name, or none at all.
    """
    valid = task_names()
    for name in tasks:
        if name not in valid:
            raise unknown("task", name, valid, "--tasks")
    if not tasks:
        raise UserError("no task given", "--tasks", f"choose from {', '.join(valid)}")
    return list(dict.fromkeys(tasks))


def run_eval(
    model_path: str | Path | None,
    dataset: str | Path,
    tasks: Sequence[str],
    decode: str = "greedy",
    limit: int | None = None,
    out: str | Path | None = None,
    **options: Any,
) -> list[Figure]:
    """Evaluates a model by one decoding method; ``out`` itself gets the files. ``options`` as in :func:`run_evals`."""
    return next(iter(run_evals(model_path, dataset, tasks, [decode], limit, out, **options).values()))


def run_evals(
    model_path: str | Path | None,
    dataset: str | Path,
    tasks: Sequence[str],
    decodes: Sequence[str] = ("greedy",),
    limit: int | None = None,
    out: str | Path | None = None,
    shuffled: bool = True,
    align: str | Path | None = None,
    seed: int = 0,
    control_clusters: int | None = CONTROL_CLUSTERS,
    decoder: Any = None,
    command: str = "mmllm eval",
    blind: bool = False,
    nproc: int = 1,
) -> dict[str, list[Figure]]:
    """Evaluates a model by one or several decoding methods, which then share one loaded copy of it.

    ``out`` gets ``results.json``, ``predictions.jsonl``, ``report.html`` and ``trace.json``; with several methods a
    folder of each method's name does.

    Args:
        model_path: run folder or model folder of the multimodal LLM; not needed for ``retrieval`` alone.
        dataset: dataset folder, or its reference such as ``starter:full``.
        tasks: names from :func:`task_names`.
        decodes: decoding methods, such as ``greedy`` or ``vcd:alpha=1``.
        limit: most scenes, sounds or pictures per split and task.
        out: folder for the output; default ``eval`` in the model's (or align run's) folder.
        shuffled: also ask about shuffled media, for the first ``control_clusters`` scenes of each task.
        align: align run for ``retrieval``.
        blind: also ask the same without media; a run's own ``margins`` are judged by it.
        nproc: processes that share the questions, with a copy of the model each.
        decoder: anything with the decoder's ``score`` and ``generate``; made from ``model_path`` when absent.

    Returns:
        the method as it was understood -> its figures.

    Raises:
        UserError: unknown task or decoding method, missing data, no model, or a task that this dataset cannot serve.
    """
    from mmllm.data.models import resolve_dataset
    from mmllm.decode import parse_spec

    start = time.monotonic()
    chosen = check_tasks(tasks)
    specs = list(dict.fromkeys(str(parse_spec(d)) for d in decodes))
    data = EvalData(resolve_dataset(str(dataset)), limit, seed)
    asked = {spec: make_tasks(data, chosen) for spec in specs}  # a task keeps its threshold, so each has its own
    on_model = any(asked.values())
    if "retrieval" in chosen and align is None:
        raise UserError("task 'retrieval' needs an align run", "--align", "give --align RUN or leave the task out")
    if decoder is not None:
        nproc = 1
    elif on_model and nproc == 1:
        decoder = load_decoder(model_path)
    elif on_model and model_path is None:
        raise UserError("these tasks need a model", "--model", "give --model RUN")
    home = model_path or align
    if out is None and home is None:
        raise UserError("nowhere to write to", "--out", "give a folder")
    top = Path(out) if out is not None else Path(str(home)) / "eval"
    folders = {spec: top / folder_of(spec) if len(specs) > 1 else top for spec in specs}
    if len(set(folders.values())) < len(specs):
        raise UserError("two methods would write into one folder", "--decode", "evaluate them one by one")

    jobs = {spec: make_jobs(asked[spec], shuffled, control_clusters, seed, blind, spec) for spec in specs}
    firsts = {spec: some[0] for spec, some in jobs.items() if some and spec != "greedy"}
    traced = [to_trace(job, seed) for job in firsts.values()]
    steps = answer_jobs([j for some in jobs.values() for j in some], seed, decoder, model_path, nproc, traced)
    traces = dict(zip(firsts, steps, strict=False))  # a decoder of another kind gives none
    found: dict[str, list[Figure]] = {}
    for spec, folder in folders.items():
        folder.mkdir(parents=True, exist_ok=True)
        figures = found[spec] = finish(asked[spec], jobs[spec])
        judge_margins(figures, model_path)
        if jobs[spec]:
            write_predictions(folder / "predictions.jsonl", jobs[spec])
            if spec in traces:
                write_trace(folder / "trace.json", jobs[spec][0], traces[spec])
        if "retrieval" in chosen:
            from mmllm.evaluate.alignment import alignment_figures

            figures += alignment_figures(align, data)  # type: ignore[arg-type]
        extra = {
            "missing": data.manifest.get("missing", []), "model": None if model_path is None else str(model_path),
            "align": None if align is None else str(align), "data": str(dataset), "decode": spec, "limit": limit,
            "seconds": round(time.monotonic() - start, 1),
        }  # fmt: skip
        write_figures(folder / "results.json", command, seed, None, data.manifest.get("sources", []), figures, **extra)
        if jobs[spec]:
            write_eval_report(folder)
    return found


def make_tasks(data: EvalData, chosen: Sequence[str]) -> list[EvalTask]:
    """The chosen tasks that ask a model, one for each split of the dataset.

    Raises:
        UserError: the dataset has nothing for a task.
    """
    made: list[EvalTask] = []
    for name in chosen:
        if name == "retrieval":
            continue
        task = get("task", name)
        splits = task.splits(data)
        if not splits:
            raise UserError(
                f"the dataset has nothing for task '{name}'", data.root, "build it again or leave the task out"
            )
        made += [task(data, split) for split in splits]
    return made


def folder_of(spec: str) -> str:
    """A folder name for a decoding method: "vcd:alpha=0.5" -> "vcd_alpha=0.5"."""
    return re.sub(r"[^\w.=+-]+", "_", spec)
