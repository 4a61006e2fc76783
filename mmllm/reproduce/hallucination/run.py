"""`mmllm reproduce hallucination`: data, training, the check, choosing on dev, one run on test, the report."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from mmllm.config import StrictModel, load_config
from mmllm.data.models import resolve_dataset
from mmllm.data.planted import Prior
from mmllm.errors import UserError
from mmllm.evaluate.answer import load_decoder
from mmllm.evaluate.stats import best_threshold, derangement
from mmllm.evaluate.tasks import Sample, shuffled
from mmllm.reproduce.arms import Arm, Command, Step, run_command, train_arm
from mmllm.reproduce.hallucination import answers
from mmllm.reproduce.hallucination import questions as q
from mmllm.reproduce.hallucination.captions import CaptionTable, tabulate
from mmllm.reproduce.hallucination.conditions import (
    BASE,
    CONDITIONS,
    Condition,
    chosen_name,
    conditions_of,
    confirmatory,
    grid,
)
from mmllm.reproduce.hallucination.data import DataPlan, build, data_key, read_prior
from mmllm.reproduce.hallucination.measures import Bench, Judged, choose
from mmllm.reproduce.hallucination.verdict import bias_took
from mmllm.reproduce.ledger import Ledger, seconds

Size = Literal["smoke", "full"]
SOURCE = "starter:full"
CODE = ("mmllm.decode", "mmllm.model")  # other code may give other answers


class Plan(StrictModel):
    """One size in configs/effects/hallucination.yaml.

    Attributes:
        seeds: training seeds; align, tune: key=value overrides of the two configs beside this one.
        captions: scenes that are described, half of them natural, half hidden twins.
        decoding_seeds: captions of each scene where answers are drawn.
        max_new_tokens: of a caption.
    """

    seeds: int = Field(default=1, ge=1)
    data: DataPlan = Field(default_factory=DataPlan)
    align: list[str] = []
    tune: list[str] = []
    captions: int = Field(default=48, ge=2)
    decoding_seeds: int = Field(default=2, ge=1)
    max_new_tokens: int = Field(default=64, ge=1)


class Plans(StrictModel):
    """configs/effects/hallucination.yaml."""

    smoke: Plan
    full: Plan


@dataclass
class Findings:
    """What was measured, for the report.

    Attributes:
        check: greedy before any method was run. took: the manipulation check was passed; if not, ``judged`` holds
            greedy alone.
        judged: conditions by name, greedy first. chosen: condition -> the spec chosen on dev.
        captions: condition -> counts, those of chosen settings included. stages: stage -> seconds.
    """

    plan: Plan
    prior: Prior
    bench: Bench
    check: Judged
    took: bool
    judged: dict[str, Judged]
    chosen: dict[str, str] = field(default_factory=dict)
    captions: dict[str, CaptionTable] = field(default_factory=dict)
    stages: dict[str, float] = field(default_factory=dict)
    sources: list[dict[str, Any]] = field(default_factory=list)


def code_hash(packages: Sequence[str] = CODE) -> str:
    """sha256 of the source files of some packages."""
    digest = hashlib.sha256()
    for package in packages:
        spec = importlib.util.find_spec(package)
        assert spec is not None and spec.origin is not None
        for file in sorted(Path(spec.origin).parent.glob("*.py")):
            digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def arm(plan: Plan) -> Arm:
    """The model under test, by the same commands as a user's."""
    return Arm("model", (Step("align", "configs/effects/hallucination_align.yaml", tuple(plan.align)),
                         Step("tune", "configs/effects/hallucination_tune.yaml", tuple(plan.tune))))  # fmt: skip


def source_folder(offline: bool) -> Path:
    """The starter dataset that the cut-outs come from; built when it is not there."""
    try:
        return resolve_dataset(SOURCE)
    except UserError:
        from mmllm.data.build import build_dataset

        return build_dataset("starter.yaml", SOURCE.partition(":")[2], offline=offline)


class Experiment:
    """Holds what all stages need; every stage is kept in the ledger.

    Args:
        source: dataset that the cut-outs come from.
        command: runs a training step.
    """

    def __init__(
        self, plan: Plan, source: Path, out: Path, conditions: Sequence[Condition] = CONDITIONS,
        command: Command = run_command,
    ):  # fmt: skip
        self.plan, self.conditions, self.command = plan, conditions, command
        self.ledger = Ledger(out)
        self.folders: dict[str, Path] = {}
        self.key = data_key(plan.data, source)
        self.data = self.stage("data", self.key, partial(build, plan.data, source))
        self.prior = read_prior(self.data)
        self.models: list[Path] = []

    def stage(self, name: str, key: dict[str, Any], make: Callable[[Path], None]) -> Path:
        self.folders[name] = self.ledger.stage(name, key, make)
        return self.folders[name]

    def train(self, seed: int) -> None:
        """Adds the model of a training seed."""
        runs = train_arm(arm(self.plan), seed, self.data, self.ledger, self.key, self.command)
        self.folders |= {f"{run.parent.name.rpartition('-')[0]}": run.parent for run in runs}
        self.models.append(runs[-1])

    def margins(self, name: str, samples: Sequence[Sample], specs: Sequence[str]) -> dict[str, NDArray]:
        """Spec -> margins [training seeds, n]; what is kept is read."""
        parts = []
        for seed, model in enumerate(self.models):
            key = {"model": model.parent.name, "specs": list(specs), "samples": [s.id for s in samples],
                   "data": self.key, "code": code_hash()}  # fmt: skip
            decoder = cache(partial(load_decoder, model))
            folder = self.stage(f"{name}-seed{seed}", key,
                                partial(answers.score, decoder, samples, specs, seed=self.plan.data.seed))  # fmt: skip
            parts.append(answers.read_margins(folder, samples, specs))
        return {spec: np.stack([p[spec] for p in parts]) for spec in specs}

    def captions(self, samples: Sequence[Sample], specs: dict[str, str]) -> dict[str, CaptionTable]:
        """Condition -> counts of its captions, all training seeds together."""
        rows: list[dict[str, Any]] = []
        wanted = list(dict.fromkeys(specs.values()))
        seeds = list(range(self.plan.decoding_seeds))
        for seed, model in enumerate(self.models):
            key = {"model": model.parent.name, "specs": wanted, "samples": [s.id for s in samples], "seeds": seeds,
                   "data": self.key, "tokens": self.plan.max_new_tokens, "code": code_hash()}  # fmt: skip
            decoder = cache(partial(load_decoder, model))
            make = partial(answers.describe, decoder, samples, wanted, seeds=seeds,
                           max_new_tokens=self.plan.max_new_tokens)  # fmt: skip
            rows += answers.read_captions(self.stage(f"captions-seed{seed}", key, make))
        return tabulate(rows, samples, self.prior, specs)


def say(text: str) -> None:
    """A line of progress."""
    print(f"\n-- {text}", flush=True)


def investigate(
    plan: Plan, source: Path, out: Path, conditions: Sequence[Condition] = CONDITIONS, command: Command = run_command
) -> Findings:
    """Runs every stage that is not finished yet; arguments as of ``Experiment``."""
    say("data: planted scenes")
    e = Experiment(plan, source, out, conditions, command)
    seed = plan.data.seed
    for k in range(plan.seeds):
        say(f"training seed {k}: align and tune")
        e.train(k)
    samples = q.test_questions(e.data, e.prior, seed)
    bench = Bench(samples, frozenset(e.prior.clean), seed)
    say(f"check: greedy on {len(samples):,} questions")
    base = e.margins("greedy", samples, [_spec(conditions, BASE)])[_spec(conditions, BASE)]
    greedy = Judged(BASE, _spec(conditions, BASE), "baseline", base, note=_note(conditions, BASE))
    took = bias_took(bench.mean(bench.bias(greedy)))
    found = Findings(plan, e.prior, bench, greedy, took, {BASE: greedy})
    if took:
        compare(e, found)
    else:
        say("the bias did not take: no method is compared")
    found.stages = {name: seconds(folder) for name, folder in e.folders.items()}
    found.sources = _sources(e.data)
    return found


def compare(e: Experiment, found: Findings) -> None:
    """Chooses settings on dev, then answers everything once on test.

    Greedy is asked again beside the others: in bfloat16 a margin depends a little on what else is in the batch, and a
    comparison must not see that.
    """
    seed = e.plan.data.seed
    dev = q.dev_questions(e.data, e.prior, seed)
    dev_bench = Bench(dev, seed=seed)
    tried = {c.name: grid(c) for c in confirmatory(e.conditions)}
    every = list(dict.fromkeys([BASE, *(s for specs in tried.values() for s in specs)]))
    say(f"dev: {len(dev):,} questions, {len(every)} settings")
    on_dev = e.margins("dev", dev, every)
    found.chosen = {name: choose(dev_bench, {s: on_dev[s] for s in specs}) for name, specs in tried.items()}

    samples = found.bench.samples
    named = [(c.name, c.spec, c) for c in e.conditions]
    named += [(chosen_name(c), found.chosen[c.name], c) for c in confirmatory(e.conditions)]
    say(f"test: {len(samples):,} questions, {len(named)} conditions")
    alone = {c.name: c.alone for c in e.conditions if c.alone}
    specs = list(dict.fromkeys([*(spec for _, spec, _ in named), *(spec for spec, _, _ in alone.values())]))
    on_test = e.margins("test", samples, specs)
    base = on_test[found.judged[BASE].spec]
    for name, spec, c in named:
        found.judged[name] = Judged(name, spec, c.kind, on_test[spec], temperature_of(spec), c.note)
    for name, (spec, x, y) in alone.items():
        title = f"second view of {name}"
        note = "what the changed picture alone says"
        found.judged[title] = Judged(title, "", "view", x * base + y * on_test[spec], note=note)
    add_controls(e, found, base, dev_bench, on_dev[BASE])

    described = caption_scenes(e.data, e.plan.captions)
    writes = {c.name: c.spec for c in e.conditions if c.captions}
    writes |= {chosen_name(c): found.chosen[c.name] for c in confirmatory(e.conditions) if c.captions}
    say(f"captions: {len(described)} scenes, {len(writes)} conditions")
    found.captions = e.captions(described, writes)


def add_controls(e: Experiment, found: Findings, base: NDArray, dev: Bench, dev_base: NDArray) -> None:
    """The controls that are arithmetic on greedy's margins."""
    pick = dev.use(q.ADVERSARIAL)
    offsets = np.array([-best_threshold(m[pick], dev.gold[pick]) for m in dev_base])
    note = "greedy plus a constant on the yes margin, chosen on dev: " + ", ".join(f"{c:+.2f}" for c in offsets)
    found.judged["yes offset"] = Judged("yes offset", "", "control", base + offsets[:, None], note=note)
    other = e.margins("unrelated", unrelated(found.bench.samples, e.plan.data.seed), [BASE])[BASE]
    note = "the second view is another scene's picture (alpha 1, no mask)"
    found.judged["unrelated picture"] = Judged("unrelated picture", "", "control", 2 * base - other, note=note)


def unrelated(samples: Sequence[Sample], seed: int) -> list[Sample]:
    """The same questions, each about the picture of another scene, never of its own twin."""
    clusters = list(dict.fromkeys(s.cluster for s in samples))
    media = {s.cluster: s.media for s in samples}
    other = {c: clusters[j] for c, j in zip(clusters, derangement(len(clusters), seed), strict=True)}
    return [shuffled(s, media[other[s.cluster]]) for s in samples]


def caption_scenes(data: Path, count: int) -> list[Sample]:
    """Scenes to describe: half natural, half hidden twins, where the partner of an A is missing."""
    hidden = [s for s in q.read_scenes(data, "twins") if s["meta"]["twin"] == "hidden"]
    return q.caption_samples([*q.read_scenes(data, "natural")[: count - count // 2], *hidden[: count // 2]])


def temperature_of(spec: str) -> float:
    from mmllm.decode import parse_spec

    return parse_spec(spec).temperature


def _spec(conditions: Sequence[Condition], name: str) -> str:
    return next(c.spec for c in conditions if c.name == name)


def _note(conditions: Sequence[Condition], name: str) -> str:
    return next(c.note for c in conditions if c.name == name)


def _sources(data: Path) -> list[dict[str, Any]]:
    return json.loads((data / "dataset.json").read_text(encoding="utf-8"))["sources"]


def reproduce(
    size: Size = "full",
    seeds: int | None = None,
    out: Path = Path("runs/hallucination"),
    docs: Path = Path("docs"),
    offline: bool = False,
    command: str = "mmllm reproduce hallucination",
) -> Path:
    """Runs the experiment, or what of it is missing, and writes ``hallucination.md`` and ``hallucination.json``.

    Args:
        seeds: training seeds instead of the size's own.
        out: keeps every finished stage.
        docs: folder of the report. A smoke run does not replace the report of a full one and writes into ``out``.

    Raises:
        UserError: data or models cannot be had.
    """
    from mmllm.reproduce.hallucination.page import write_report

    plan: Plan = getattr(load_config("configs/effects/hallucination.yaml", [], Plans), size)
    if seeds is not None:
        plan = plan.model_copy(update={"seeds": seeds})
    found = investigate(plan, source_folder(offline), out / size, conditions_of(size == "full"))
    if size == "smoke" and written_size(docs) == "full":
        say(f"{docs} holds the report of the full size, which stays")
        docs = out / size
    return write_report(found, docs, size, command)


def written_size(docs: Path) -> str | None:
    """The size that the report in a folder was made with; None without one."""
    file = docs / "hallucination.json"
    return json.loads(file.read_text(encoding="utf-8")).get("size") if file.is_file() else None
