"""The align stage: reads its config, makes towers and sources, trains phase after phase, measures, writes final/."""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmllm.align.config import (
    Data,
    PhaseConfig,
    SourceConfig,
    check_streams,
)
from mmllm.config import load_config
from mmllm.errors import UserError, unknown
from mmllm.train.align_config import AlignConfig


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
        self.model = self._make_model()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = feature_dtype(config.features.dtype, self.device)
        plan = loader_plan(self.device.type, available_cores(), local_processes())
        self.workers = config.data.workers or plan.workers
        self.frozen = FrozenFeatures(FeatureCache(), dtype, self.device, config.features.batch_size, self.workers)
        listed = "rejected.jsonl" if rank() == 0 else f"rejected-{rank()}.jsonl"
        self.rejected = Rejected(run.path / listed if run is not None else None, config.data.max_rejected)
        self.vocabularies: dict[str, dict[str, Any]] = {}
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

    # ---- model ----

    def _make_model(self) -> Any:
        from mmllm.align.model import AlignModel, ProjectionHead
        from mmllm.connectors import build_connector

        towers: dict[str, Any] = {}
        for name, stream in self.config.streams.items():
            if stream.tower is None:
                continue
            towers[name] = load_stream_tower(self.config, name, self.offline)
            if stream.image_size and hasattr(towers[name], "image_size"):
                towers[name].image_size = stream.image_size
        tower_of = {n: s.tower_of or n for n, s in self.config.streams.items()}
        dim = self.config.embedding_dim
        heads, connectors = {}, {}
        for name, stream in self.config.streams.items():
            width = towers[tower_of[name]].hidden_size
            if stream.head is not None:
                heads[name] = ProjectionHead(towers[tower_of[name]].pooled_size, dim, stream.head)
            if stream.connector is not None:
                out_dim = towers[self.config.words].hidden_size if self.config.words else dim
                spec = {"in_dim": width, "out_dim": out_dim, **stream.connector}
                grid = getattr(towers[tower_of[name]], "grid", None)
                if spec.get("positions") and not spec.get("grid") and grid is not None:
                    spec["grid"] = list(grid[1:])
                connectors[name] = build_connector(spec)
        model = AlignModel(towers, tower_of, heads, connectors, self._pairs(), dim)
        model.image_size = {n: s.image_size for n, s in self.config.streams.items() if s.image_size}
        return model.eval()

    def _pairs(self) -> list[tuple[str, str]]:
        found = []
        for phase in self.config.phases.values():
            for objective in phase.objectives:
                pair = objective.options.get("pair")
                if pair is not None and tuple(pair) not in found:
                    check_streams(self.config.streams, list(pair), f"phase '{phase.name}', objective")
                    found.append(tuple(pair))
        return found

    # ---- phases ----

    def located(self, data: Data | list[str]) -> Iterator[Any]:
        """The records of one or several files of the dataset with their places; see ``located_records``."""
        from mmllm.data.open import located_records

        for source in data if isinstance(data, list) else [data]:
            yield from located_records(source, root=self.folder)

    def records(self, data: Data | list[str]) -> list[dict[str, Any]]:
        """The records of one or several files of the dataset.

        Raises:
            UserError: something that is no record.
        """
        out = []
        for item in self.located(data):
            if item.record is None:
                raise UserError(item.problem, item.where)
            out.append(item.record)
        return out

    def objectives(self, phase: PhaseConfig) -> tuple[list[Any], list[Any]]:
        """The phase's objectives and their terms.

        Raises:
            UserError: unknown objective or option.
        """
        import mmllm.align.objectives
        import mmllm.align.region_box  # noqa: F401  (both register the core objectives)
        from mmllm.align.step import Term
        from mmllm.registry import get

        made, terms = [], []
        for spec in phase.objectives:
            cls = get("objective", spec.type, f"phase '{phase.name}'")
            valid = list(inspect.signature(cls).parameters)
            options = dict(spec.options)
            for key in options:
                if key not in valid:
                    raise unknown("option", key, valid, f"objective '{spec.type}'")
            if "dim" in valid and "dim" not in options:
                if self.config.words is None:
                    do = "name the stream of the LLM's word embeddings"
                    raise UserError(f"objective '{spec.type}' needs 'words'", f"phase '{phase.name}'", do)
                options["dim"] = self.model.tower(self.config.words).hidden_size
            try:
                made.append(cls(**options))
            except TypeError as e:
                raise UserError(str(e).split("() ")[-1], f"objective '{spec.type}'") from None
            name = f"{spec.type}:{':'.join(options['pair'])}" if "pair" in options else spec.type
            name = f"{name}:{options['stream']}" if "stream" in options else name
            terms.append(Term(name, spec.weight, tuple(spec.sources or phase.sources)))
        return made, terms

    def vocabulary(self, source: str, records: list[dict[str, Any]], labels: list[str]) -> dict[str, Any]:
        """Names of a source (of its boxes, else of its items) and their word embeddings."""
        import torch

        names = sorted({b["text"] for r in records for b in r.get("boxes") or []}) or sorted(set(labels))
        assert self.config.words is not None
        tower = self.model.tower(self.config.words)
        with torch.inference_mode():
            table = tower(**tower.encode(names)).pooled.float()
        return {"index": {n: i for i, n in enumerate(names)}, "embedding": table.clone(), "source": source}

    def groups(self, phase: PhaseConfig, step: Any) -> list[tuple[str, list[Any], float | None]]:
        """What trains in a phase, as parameter groups.

        Raises:
            UserError: a part that does not exist, or nothing to train.
        """
        parts = self.model.parts()
        made = {"embedding": "head", "token_embedding": "connector"}
        feeds = [
            (stream, kind) for streams in step.want.values() for stream, kinds in streams.items() for kind in kinds
        ]
        used_parts = {f"{s}.{made[k]}" for s, k in feeds} | {f"{self.model.tower_of[s]}.tower" for s, _ in feeds}
        wanted: list[str] = []
        for name in phase.trains:
            found = [name] if name in parts else [p for p in parts if p.split(".")[0] == name and p in used_parts]
            if not found or ("." in name and name not in parts):
                raise unknown("part", name, parts, f"phase '{phase.name}', trains")
            wanted += found
        for name in phase.learning_rates:
            if name not in parts:
                raise unknown("part", name, parts, f"phase '{phase.name}', learning_rates")
        base = float(phase.train.get("learning_rate", self.config.train.learning_rate))
        groups: list[tuple[str, list[Any], float | None]] = []
        for name in dict.fromkeys(wanted):
            may = getattr(parts[name], "trainable", parts[name].parameters)
            groups.append((name, list(may()), phase.learning_rates.get(name)))
            if name.endswith(".tower") and not groups[-1][1]:
                do = f"leave {name} out, or let its tower's 'train' be full, last_n or lora"
                raise UserError(f"'{name}' is frozen by its own 'train: none'", f"phase '{phase.name}', trains", do)
        used = {o.pair_name for o in step.objectives if hasattr(o, "pair_name")}
        scales = [self.model.logit_scale[p] for p in sorted(used)]
        scales += [self.model.logit_bias[o.pair_name] for o in step.objectives if hasattr(o, "initial_bias")]
        groups.append(("logit_scale", scales, None))
        for i, o in enumerate(step.objectives):
            groups.append((step.terms[i].name, list(o.parameters()), base * o.lr_multiplier))
        self.model.active = set(wanted)
        return [g for g in groups if g[1]]

    def train_phase(self, number: int, phase: PhaseConfig) -> dict[str, Any]:
        """Trains one phase; returns the trainer's summary."""
        import torch

        from mmllm.align.step import AlignStep, needed
        from mmllm.train.params import set_trainable
        from mmllm.train.trainer import MMTrainer

        torch.manual_seed(self.config.train.seed + 1000 * number)
        objectives, terms = self.objectives(phase)
        want = needed(objectives, terms, {s: c.streams for s, c in phase.sources.items()})
        for objective in objectives:  # fresh temperature and bias where the loss has its own start (SigLIP)
            if hasattr(objective, "initial_bias"):
                with torch.no_grad():
                    self.model.logit_scale[objective.pair_name].fill_(objective.initial_scale)
                    self.model.logit_bias[objective.pair_name].fill_(objective.initial_bias)
        step = AlignStep(self.model, objectives, terms, want)
        groups = self.groups(phase, step)
        training = {s for s in self.config.streams if f"{self.model.tower_of[s]}.tower" in self.model.active}
        size = int(phase.train.get("per_device_train_batch_size", self.config.train.per_device_train_batch_size))
        contrasts = {s for o, t in zip(objectives, terms) if hasattr(o, "pair") for s in t.sources}
        needs_words = {s for o, t in zip(objectives, terms) if "vocabulary" in o.needs for s in t.sources}
        sources = {}
        for i, (name, spec) in enumerate(phase.sources.items()):
            sources[name] = self._source(name, spec, want[name], training, number * 16 + i, size, name in contrasts)
            if name in needs_words:
                held = self.vocabulary(name, sources[name].records, sources[name].labels)
                step.vocabularies[name] = held
                for stream, kinds in want[name].items():
                    if "token_embedding" in kinds:
                        self.vocabularies[stream] = held
                        self.vocabulary_names[stream] = list(held["index"])

        def batch_fn(n: int, rank: int, world: int) -> dict[str, Any]:
            return {"sources": {k: s.batch(n, rank, world) for k, s in sources.items()}}

        items = max(len(s.records) for s in sources.values())
        trainer = MMTrainer(
            step, batch_fn, set_trainable(step, groups), self.config.train, self.run, phase=phase.name, items=items,
            **{"bf16": self.train_dtype == torch.bfloat16, **phase.train},
        )  # fmt: skip
        summary = trainer.fit()
        step.to(self.device)
        self.model.active = set()
        self.model.requires_grad_(False).eval()
        return summary

    def _source(
        self,
        name: str,
        spec: SourceConfig,
        want: dict[str, set[str]],
        training: set[str],
        number: int,
        size: int,
        contrasts: bool,
    ) -> Any:
        from mmllm.align.source import AlignSource, source_needs
        from mmllm.data.screen import usable_records

        needs, limit = source_needs(spec, self.model, self.config.data.long_text)
        records = usable_records(self.located(spec.data), name, self.rejected, needs, limit, spec.languages)
        self.notice(f"source '{name}': {len(records):,} records")
        began = time.monotonic()
        source = AlignSource(
            name, spec, records, self.model, want, training, self.frozen, self.config.train.seed, number, size,
            progress=Counter(name), contrasts=contrasts, rejected=self.rejected, workers=self.workers,
        )  # fmt: skip
        if count := self.rejected.count(name):
            self.notice(f"source '{name}': {count:,} items left out, listed in {self.rejected.path}")
        if (spent := time.monotonic() - began) > 1:
            self.notice(f"source '{name}': ready after {spent:.0f} s")
        return source


def load_stream_tower(config: AlignConfig, name: str, offline: bool = False) -> Any:
    """The tower of a stream that has one of its own."""
    from mmllm.data.models import resolve_model
    from mmllm.towers import load_tower

    stream = config.streams[name]
    spec = {"model": stream.tower} if isinstance(stream.tower, str) else dict(stream.tower or {})
    spec["model"] = resolve_model(str(spec.get("model", "")), offline=offline)
    return load_tower(spec, stream.modality)


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
    from mmllm.report.figures import print_figures, write_figures
    from mmllm.report.runs import write_run_report
    from mmllm.train.align_measures import measure_all
    from mmllm.train.launch import is_main
    from mmllm.train.run import RunFolder

    folder = Path(resolve_dataset(config.dataset))
    about = dataset_info(folder)
    run = RunFolder.open(out, "align", config, resume, seed=config.train.seed, sources=about.get("sources", []))
    if run.finished:
        print(f"{out}: already finished", flush=True)
        return out
    with run.begun():
        stage = AlignStage(config, run)
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
