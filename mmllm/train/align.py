"""The align stage: reads its config, makes towers and sources, trains phase after phase, measures, writes final/."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmllm.align.config import Data, PhaseConfig, SourceConfig, StreamConfig
from mmllm.config import load_config
from mmllm.errors import UserError
from mmllm.train.align_config import AlignConfig
from mmllm.train.align_model import make_model
from mmllm.train.align_trains import check_reset, groups, own_start, reset, teachers


class AlignStage:
    """Holds the model and everything made once for all phases."""

    def __init__(self, config: AlignConfig, run: Any = None, offline: bool = False):
        import torch
        from transformers import set_seed

        from mmllm.align.frozen import FrozenFeatures, feature_dtype
        from mmllm.blocks.compute import fast_dtype
        from mmllm.data.features import FeatureCache
        from mmllm.data.loader import loader_plan
        from mmllm.data.models import resolve_dataset
        from mmllm.data.rejected import Rejected
        from mmllm.train.launch import available_cores, local_processes, rank, set_threads

        set_threads(config.train.threads)
        set_seed(config.train.seed)
        self.config, self.run = config, run
        self.folder = Path(resolve_dataset(config.dataset))
        self.offline = offline
        self.model = make_model(config, offline)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = feature_dtype(config.features.dtype, self.device)
        plan = loader_plan(self.device.type, available_cores(), local_processes())
        self.workers = config.data.workers or plan.workers
        self.frozen = FrozenFeatures(FeatureCache(), dtype, self.device, config.features.batch_size, self.workers)
        listed = "rejected.jsonl" if rank() == 0 else f"rejected-{rank()}.jsonl"
        self.rejected = Rejected(run.path / listed if run is not None else None, config.data.max_rejected)
        self.vocabularies: dict[str, dict[str, Any]] = {}
        self.steps: dict[str, Any] = {}  # phase -> its AlignStep, whose objectives and hooks measures may ask
        self.nearest: list[dict[str, Any]] = []  # queries with their nearest names, for the run's page
        self.vocabulary_names: dict[str, list[str]] = {}
        self.train_dtype = fast_dtype(self.device) if config.dtype == "auto" else getattr(torch, config.dtype)
        names = [str(d).split(".")[1] for d in (dtype, self.train_dtype)]
        self.notice(f"frozen towers run in {names[0]}, training in {names[1]}")

    def notice(self, text: str) -> None:
        """One plain line for the reader of the terminal, from the main process only."""
        from mmllm.train.launch import is_main

        if is_main():
            print(text, flush=True)

    # ---- phases ----

    def located(self, data: Data | list[str]) -> Iterator[Any]:
        """The records of one or several files of the dataset with their places; see ``located_records``."""
        from mmllm.data.open import located_records

        for source in data if isinstance(data, list) else [data]:
            yield from located_records(source, root=self.folder)

    def records(self, data: Data | list[str], recipes: Sequence[Any] = ()) -> list[dict[str, Any]]:
        """The records of one or several files of the dataset, after data recipes.

        Raises:
            UserError: something that is no record.
        """
        from mmllm.data.recipes import apply_recipes

        out = []
        for item in apply_recipes(self.located(data), recipes):
            if item.record is None:
                raise UserError(str(item.problem), item.where)
            out.append(item.record)
        return out

    def vocabulary(self, source: str, records: list[dict[str, Any]], labels: list[str]) -> dict[str, Any]:
        """Names of a source (of its boxes, else of its items) and their word embeddings."""
        from mmllm.align.model import pooled_texts

        names = sorted({b["text"] for r in records for b in r.get("boxes") or []}) or sorted(set(labels))
        assert self.config.words is not None
        table = pooled_texts(self.model.tower(self.config.words), names)
        return {"index": {n: i for i, n in enumerate(names)}, "embedding": table, "source": source}

    def check_phases(self) -> None:
        """Makes every phase's objectives and hooks once, so that mistakes in any of them show before data are read.

        Raises:
            UserError: see ``phase_parts``, ``check_reset`` and ``groups``; an unknown hook, measure or option.
        """
        import torch

        from mmllm.align.step import AlignStep
        from mmllm.train.align_measures import kind_of
        from mmllm.train.align_objectives import phase_parts

        for measure in self.config.measures.values():
            kind_of(measure)
        with torch.random.fork_rng(devices=[]):
            for phase in self.config.phases.values():
                check_reset(self.config, self.model, phase)
                parts = phase_parts(self.config, phase, self.model)
                groups(self.config, self.model, phase, AlignStep(self.model, parts.objectives, parts.terms, parts.want))
                self.hooks(phase)
        self.model.active = set()

    def hooks(self, phase: PhaseConfig) -> list[Any]:
        """The phase's step hooks.

        Raises:
            UserError: unknown hook or option.
        """
        from mmllm.registry import make

        return [make("step_hook", spec, f"phase '{phase.name}', hooks") for spec in phase.hooks]

    def train_phase(self, number: int, phase: PhaseConfig) -> dict[str, Any]:
        """Trains one phase; returns the trainer's summary."""
        import torch

        from mmllm.align.bank import EpochHook, prepare
        from mmllm.align.step import AlignStep
        from mmllm.contracts import Objective
        from mmllm.train.align_measures import MeasureHook
        from mmllm.train.align_objectives import phase_parts
        from mmllm.train.launch import world_size
        from mmllm.train.params import set_trainable
        from mmllm.train.trainer import MMTrainer

        torch.manual_seed(self.config.train.seed + 1000 * number)
        reset(self.config, self.model, phase)
        parts = phase_parts(self.config, phase, self.model)
        own_start(self.model, parts.objectives)
        step = AlignStep(self.model, parts.objectives, parts.terms, parts.want, chunk=phase.chunk_size)
        trained = groups(self.config, self.model, phase, step)
        step.teachers.update(teachers(self.model, parts))
        sources = self._sources(number, phase, parts, step)
        prepare(step, sources)
        self.steps[phase.name] = step
        section = {"bf16": self.train_dtype == torch.bfloat16, **phase.train}
        accumulation = int(section.get("gradient_accumulation_steps", self.config.train.gradient_accumulation_steps))

        def batch_fn(n: int, rank: int, world: int) -> dict[str, Any]:
            made = {k: s.batch(n, rank, world) for k, s in sources.items()}
            return {"sources": made, "step": n // accumulation}

        hooks = self.hooks(phase)
        if any(m.every for m in self.config.measures.values()):
            hooks.append(MeasureHook(self, phase.name))
        step.hooks.extend(h for h in hooks if isinstance(h, torch.nn.Module))
        if any(type(o).on_epoch is not Objective.on_epoch for o in parts.objectives):
            hooks.insert(0, EpochHook(sources, world_size() * accumulation))
        items = max(len(s.records) for s in sources.values())
        trainer = MMTrainer(
            step, batch_fn, set_trainable(step, trained), self.config.train, self.run, phase=phase.name, items=items,
            hooks=hooks, also_save=("teachers.",), **section,
        )  # fmt: skip
        step.total_steps = trainer.args.max_steps
        with self.frozen.changing(
            [self.model.tower(n) for n in self.model.tower_of if f"{n}.tower" in self.model.active]
        ):
            summary = trainer.fit()
        step.to(self.device)
        self.model.active = set()
        self.model.requires_grad_(False).eval()
        return summary

    def _sources(self, number: int, phase: PhaseConfig, parts: Any, step: Any) -> dict[str, Any]:
        """The phase's sources, with vocabularies where an objective needs words."""
        training = {s for s in self.config.streams if s in self.model.tower_of and
                    f"{self.model.tower_of[s]}.tower" in self.model.active}  # fmt: skip
        size = int(phase.train.get("per_device_train_batch_size", self.config.train.per_device_train_batch_size))
        looked_at = [(o, s) for o, t in zip(parts.objectives, parts.terms) for s in t.sources]
        contrasts = {s for o, s in looked_at if hasattr(o, "pair") or hasattr(o, "pairs")}
        needs_words = {s for o, s in looked_at if "vocabulary" in o.needs}
        sources = {}
        for i, (name, spec) in enumerate(phase.sources.items()):
            sources[name] = self._source(
                name, spec, parts.want[name], training, number * 16 + i, size, name in contrasts, parts.derived
            )
            if name in needs_words:
                held = self.vocabulary(name, sources[name].records, sources[name].labels)
                step.vocabularies[name] = held
                for stream, kinds in parts.want[name].items():
                    if "token_embedding" in kinds:
                        self.vocabularies[stream] = held
                        self.vocabulary_names[stream] = list(held["index"])
        return sources

    def _source(
        self,
        name: str,
        spec: SourceConfig,
        want: dict[str, set[str]],
        training: set[str],
        number: int,
        size: int,
        contrasts: bool,
        derived: dict[str, StreamConfig] | None = None,
    ) -> Any:
        from mmllm.align.reading import FIELD
        from mmllm.align.record_keys import source_needs
        from mmllm.align.source import AlignSource
        from mmllm.data.recipes import apply_recipes
        from mmllm.data.screen import usable_records

        needs, limit = source_needs(spec, self.model, self.config.data.long_text)
        made = apply_recipes(self.located(spec.data), spec.recipes, f"source '{name}', recipes")
        optional = {FIELD[self.model.tower(s).modality] for s in spec.optional}
        records = usable_records(made, name, self.rejected, needs, limit, spec.languages, optional)
        self.notice(f"source '{name}': {len(records):,} records")
        began = time.monotonic()
        source = AlignSource(
            name, spec, records, self.model, want, training, self.frozen, self.config.train.seed, number, size,
            progress=Counter(name), contrasts=contrasts, rejected=self.rejected, workers=self.workers,
            derived=derived, uncached={s for s, c in (self.config.streams | (derived or {})).items() if not c.cache},
        )  # fmt: skip
        if count := self.rejected.count(name):
            self.notice(f"source '{name}': {count:,} items left out, listed in {self.rejected.path}")
        if (spent := time.monotonic() - began) > 1:
            self.notice(f"source '{name}': ready after {spent:.0f} s")
        return source


class Counter:
    """Tells every ten seconds how far a long preparation is."""

    def __init__(self, name: str):
        self.name, self.last = name, time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if time.monotonic() - self.last > 10:
            self.last = time.monotonic()
            print(f"source '{self.name}': {done:,} of {total:,}", flush=True)


def run_align(config_path: str, overrides: list[str] | tuple[str, ...], out: Path | None, resume: bool) -> Path:
    """Runs the whole stage; returns the run folder.

    Raises:
        UserError: see the config, data and run folder.
    """
    return align(load_config(config_path, overrides, AlignConfig), out or default_out(config_path), resume)


def default_out(config_path: str | Path) -> Path:
    """runs/CONFIG-NAME in the current folder."""
    return Path("runs") / Path(config_path).stem


def align(config: AlignConfig, out: Path, resume: bool = False) -> Path:
    """The stage on a ready config; see ``run_align``."""
    from mmllm.align.folder import save_align
    from mmllm.data.models import resolve_dataset
    from mmllm.malloc import keep_freed_memory
    from mmllm.report.figures import print_figures, write_figures
    from mmllm.report.runs import write_run_report
    from mmllm.train.align_measures import measure_all
    from mmllm.train.launch import is_main
    from mmllm.train.run import RunFolder

    keep_freed_memory()
    folder = Path(resolve_dataset(config.dataset))
    about = dataset_info(folder)
    run = RunFolder.open(out, "align", config, resume, seed=config.train.seed, sources=about.get("sources", []))
    if run.finished:
        print(f"{out}: already finished", flush=True)
        return out
    with run.begun():
        stage = AlignStage(config, run)
        stage.check_phases()
        for number, phase in enumerate(config.phases.values()):
            stage.train_phase(number, phase)
    if not is_main():
        return out
    figures = measure_all(stage)
    with run.final() as final:
        info = {"vocabulary": stage.vocabulary_names, "dataset": config.dataset, "words": words_ref(config)}
        save_align(stage.model, final, info)
        command = run.info().get("command", "mmllm align")
        write_figures(final / "results.json", command, config.train.seed, None, about.get("sources", []), figures)
        (final / "nearest.json").write_text(json.dumps(stage.nearest, ensure_ascii=False) + "\n", encoding="utf-8")
    report = write_run_report([out], out / "report.html")
    print_figures(figures, "align")
    print(f"report: {report}", flush=True)
    return out


def words_ref(config: AlignConfig) -> Any:
    """What the config says about the LLM whose word embeddings were aimed at."""
    return config.streams[config.words].tower if config.words else None


def dataset_info(folder: Path) -> dict[str, Any]:
    """``dataset.json`` of a built data set; empty for a plain folder."""
    file = folder / "dataset.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
