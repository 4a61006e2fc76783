"""Runs the arms of effects, one process per core; what is finished is never run again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

from mmllm.errors import UserError
from mmllm.methods import card
from mmllm.reproduce.effects.config import EffectConfig, effect, effect_file
from mmllm.reproduce.effects.verdict import Outcome, judge
from mmllm.reproduce.ledger import Ledger, seconds

Size = Literal["quick", "normal", "full"]
KEPT = ("results.json", "metrics.jsonl", "config.yaml")  # of a run; its weights are nobody's


@dataclass(frozen=True)
class Job:
    """One arm with one seed.

    Attributes:
        settings: its whole align config; ``key``: everything that its result depends on.
    """

    slug: str
    arm: str
    seed: int
    settings: dict[str, Any]
    key: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.slug}-{self.arm}-seed{self.seed}"


@dataclass
class Result:
    """An effect that was run.

    Attributes:
        figures: arm -> seed -> figure name -> value.
        minutes: of CPU processes, all arms and seeds together.
    """

    slug: str
    config: EffectConfig
    seeds: list[int]
    figures: dict[str, dict[int, dict[str, float]]] = field(default_factory=dict)
    minutes: float = 0.0

    def values(self, metric: str) -> dict[str, list[float]]:
        """Arm -> a figure for each seed.

        Raises:
            UserError: a run that does not have it.
        """
        out: dict[str, list[float]] = {}
        for arm, by_seed in self.figures.items():
            for seed in self.seeds:
                held = by_seed[seed]
                if metric not in held:
                    raise UserError(
                        f"no figure '{metric}' in arm '{arm}', seed {seed}",
                        effect_file(self.slug),
                        f"the runs have: {', '.join(sorted(held))}",
                    )
                out.setdefault(arm, []).append(held[metric])
        return out

    def outcome(self) -> Outcome:
        """The verdict on the metric of the config."""
        return judge(self.values(self.config.metric), self.config.compare, self.config.better)


def run_effects(
    slugs: Sequence[str],
    out: Path,
    size: Size = "normal",
    seeds: int | None = None,
    first_seed: int = 0,
    jobs: int | None = None,
    offline: bool = False,
    done: Callable[[Result], None] | None = None,
) -> list[Result]:
    """Runs effects one after the other, their arms and seeds side by side.

    Args:
        out: keeps finished runs by a hash of what they depend on.
        seeds: how many, from ``first_seed`` on; None: the config's (two for ``quick``).
        jobs: processes; None: one for each core.
        done: is told of each effect when all of its runs are finished.

    Raises:
        UserError: a mistake in a config, before anything runs; or, after all others are through, runs that failed
            (named with their log).
    """
    from mmllm.openmp import available_cores

    results, work = [], []
    for slug in slugs:
        config = effect(slug)
        count = seeds or (2 if size == "quick" else config.seeds)
        result = Result(slug, config, list(range(first_seed, first_seed + count)))
        results.append(result)
        work.append([job for seed in result.seeds for job in arm_jobs(slug, config, seed, size, offline)])
    count = jobs or available_cores()
    threads = max(1, available_cores() // count)
    ledger = Ledger(out)
    failed: list[UserError] = []
    with _pool(count, threads) as pool:
        for result, todo in zip(results, work):
            try:
                _run_all(pool, ledger, todo)
                for job in todo:
                    folder = ledger.folder(job.name, job.key)
                    result.figures.setdefault(job.arm, {})[job.seed] = read_figures(folder)
                    result.minutes += seconds(folder) / 60
                if done is not None:
                    done(result)
            except UserError as e:  # the other effects do not wait for this one
                if len(slugs) == 1:
                    raise
                failed.append(e)
                print(f"{result.slug}: {e}", flush=True)
    if failed:
        what = f"{len(failed)} of {len(slugs)} effects failed, the first: {failed[0].what}"
        raise UserError(what, failed[0].where, "mend it; the same command goes on with what is left")
    return results


def arm_jobs(slug: str, config: EffectConfig, seed: int, size: Size, offline: bool = False) -> Iterator[Job]:
    """The jobs of one seed; every arm's config is checked here, before anything runs.

    Raises:
        UserError: an arm whose config is not one of ``mmllm align``.
    """
    from mmllm.config import parse_config
    from mmllm.train.align_config import AlignConfig

    code = hashlib.sha256(card(slug).file.read_bytes()).hexdigest()[:16]
    where = effect_file(slug)
    for arm in config.arms:
        settings = config.settings(arm, seed, size)
        parse_config(settings, AlignConfig, f"{where}, arm '{arm}'")
        data = dataset_mark(str(settings.get("dataset", ".")), offline)
        yield Job(slug, arm, seed, settings, {"config": settings, "method": code, "data": data})


def dataset_mark(ref: str, offline: bool = False) -> Any:
    """What identifies a dataset's content; a starter dataset that is not there yet is built."""
    from mmllm.data.models import PREFIX, resolve_dataset

    if ref.startswith(PREFIX):
        try:
            folder = resolve_dataset(ref)
        except UserError:
            from mmllm.data.build import build_dataset

            folder = build_dataset("starter.yaml", ref.removeprefix(PREFIX), offline=offline)
    else:
        folder = resolve_dataset(ref)
    about = folder / "dataset.json"
    return json.loads(about.read_text(encoding="utf-8")).get("recipe_hash", ref) if about.is_file() else ref


def read_figures(folder: Path) -> dict[str, float]:
    """The figures of a finished run, and the last logged value of each term as ``log/NAME``."""
    data = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    found = {f["name"]: float(f["value"]) for f in data["figures"] if f["value"] is not None}
    with contextlib.suppress(FileNotFoundError):
        for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            found |= {f"log/{k}": float(v) for k, v in row.items() if isinstance(v, int | float)}
    return found


def _run_all(pool: Any, ledger: Ledger, jobs: Sequence[Job]) -> None:
    waiting = {pool.submit(_make, ledger.root, job): job for job in jobs if not ledger.finished(job.name, job.key)}
    if waiting:
        print(f"{jobs[0].slug}: {len(waiting)} of {len(jobs)} runs to do", flush=True)
    while waiting:
        ended, _ = wait(waiting, return_when=FIRST_COMPLETED)
        for future in ended:
            job = waiting.pop(future)
            problem = future.exception()
            if problem is not None:
                for other in waiting:
                    other.cancel()
                log = ledger.folder(job.name, job.key) / "log.txt"
                raise UserError(f"{job.name} failed: {' '.join(str(problem).split())}", log) from None


def _make(root: Path, job: Job) -> None:
    Ledger(root).stage(job.name, job.key, lambda folder: _train(job, folder))


def _train(job: Job, folder: Path) -> None:
    """One run of ``mmllm align``; what is left of it are its figures, its log and its config."""
    from mmllm.config import parse_config
    from mmllm.train.align import align
    from mmllm.train.align_config import AlignConfig

    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)  # of an attempt that was cut off: these runs are short
    config = parse_config(job.settings, AlignConfig, job.name)
    with (folder / "log.txt").open("w", encoding="utf-8") as log:
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            align(config, run)
    for name in KEPT:
        for place in (run / "final" / name, run / name):
            if place.is_file():
                shutil.copyfile(place, folder / name)
                break
    shutil.rmtree(run)


@contextlib.contextmanager
def _pool(jobs: int, threads: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that each use ``threads`` threads; an interrupt takes them along."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(threads)
    pool = ProcessPoolExecutor(jobs, mp_context=get_context("spawn"))
    try:
        yield pool
    except BaseException:
        processes = list((getattr(pool, "_processes", None) or {}).values())  # shutdown forgets them
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.terminate()
        raise
    finally:
        if before is None:
            os.environ.pop("OMP_NUM_THREADS", None)
        else:
            os.environ["OMP_NUM_THREADS"] = before
    pool.shutdown()
