"""What every task of `mmllm eval` shares: samples, rows, messages, and figures with interval, chance and control."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from mmllm.contracts import Task
from mmllm.data.questions import picture_prefix, sound_prefix
from mmllm.errors import UserError
from mmllm.evaluate.stats import derangement, ratio_gain_interval, ratio_interval
from mmllm.report.figures import Figure

SPLITS = ("seen", "new_vendor")
MEDIA = ("image", "audio")


@dataclass
class Sample:
    """One question about some media.

    Attributes:
        id: unique within its task.
        cluster: what the bootstrap draws as a whole: the scene, picture or recording.
        media: paths, pictures or one sound; ``kind`` says which.
        question: the words of the prompt.
        gold: the true answer, in whatever form the task's ``judge`` wants.
        choices: the answers to choose from by probability; None asks for free text.
        control: True when the media were shuffled among the samples, or taken away (then ``media`` is empty).
        meta: further facts for predictions.jsonl and the report (objects, boxes).
    """

    id: str
    cluster: str
    media: list[str]
    question: str
    gold: Any
    choices: list[str] | None = None
    kind: str = "image"
    control: bool = False
    meta: dict[str, Any] = field(default_factory=dict)

    def messages(self) -> list[dict[str, Any]]:
        """One user turn: media first, then the question, as in training."""
        if not self.media:
            return [{"role": "user", "content": [{"type": "text", "text": self.question}]}]
        prefix = picture_prefix(self.media) if self.kind == "image" else sound_prefix(self.media[0])
        parts = [dict(part) for part in prefix[0]["content"]]
        return [{"role": "user", "content": [*parts, {"type": "text", "text": self.question}]}]


@dataclass
class Row:
    """One answered sample.

    Attributes:
        answer: the text, generated or chosen.
        scores: log-probabilities of ``sample.choices``.
        hit, weight: the row adds ``hit`` to the numerator and ``weight`` to the denominator of its task's main figure.
        counts: further numbers that the task needs for its other figures.
    """

    sample: Sample
    answer: str
    scores: list[float] | None = None
    hit: float = 0.0
    weight: float = 1.0
    counts: dict[str, float] = field(default_factory=dict)

    def to_dict(self, task: str) -> dict[str, Any]:
        """The line of predictions.jsonl."""
        s = self.sample
        out = {
            "task": task,
            "id": s.id,
            "cluster": s.cluster,
            "media": s.media,
            "question": s.question,
            "answer": self.answer,
            "gold": s.gold,
        }
        out |= {"control": s.control, "hit": self.hit, "weight": self.weight}
        if self.scores is not None:
            out |= {"choices": s.choices, "scores": [round(x, 5) for x in self.scores]}
        return {**out, **({"counts": self.counts} if self.counts else {}), **({"meta": s.meta} if s.meta else {})}


@dataclass
class EvalData:
    """A dataset folder as the tasks read it.

    Attributes:
        root: the folder with ``dataset.json``.
        limit: most scenes (or sounds) per split and task.
        seed: for the questions drawn from the scenes.
    """

    root: Path
    limit: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        self.root = Path(self.root)
        self._scenes: dict[str, list[dict[str, Any]]] = {}

    def records(self, name: str) -> list[dict[str, Any]]:
        """Records of one JSONL file of the dataset, media paths absolute, cut to ``limit``.

        Raises:
            UserError: the file is not there.
        """
        from mmllm.data.records import read_records

        path = self.root / name
        if not path.is_file():
            raise UserError("this dataset has no such file", path, "build it again with mmllm data build")
        return [{k: _plain(v) if k in MEDIA else v for k, v in r.items()} for r in read_records(path, self.limit)]

    def has(self, name: str) -> bool:
        return (self.root / name).is_file()

    def scenes(self, split: str) -> list[dict[str, Any]]:
        """Held-out scenes of a split, ``seen`` or ``new_vendor``: records with id, image and boxes."""
        if split not in self._scenes:
            self._scenes[split] = self.records(f"eval/scenes_{split}.jsonl")
        return self._scenes[split]

    def splits(self) -> list[str]:
        return [s for s in SPLITS if self.has(f"eval/scenes_{s}.jsonl")]

    @cached_property
    def concepts(self) -> Any:
        """Contents of concepts.json, None without it."""
        path = self.root / "concepts.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """Contents of dataset.json, empty without it."""
        path = self.root / "dataset.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _plain(paths: Any) -> Any:
    """Paths without detours through "..", so that one file has one name whichever record points to it."""
    return [os.path.normpath(p) for p in paths] if isinstance(paths, list) else os.path.normpath(paths)


class EvalTask(Task):
    """A task that runs on a multimodal LLM; subclasses are registered as ("task", name).

    Attributes:
        max_new_tokens: for free answers.
        limit: most clusters that the task asks about per split by default.
    """

    max_new_tokens: int = 32
    limit: int | None = None

    def __init__(self, data: EvalData, split: str):
        self.data, self.split = data, split

    @classmethod
    def splits(cls, data: EvalData) -> list[str]:
        """The splits of the dataset that this task is asked on."""
        return data.splits()

    def samples(self) -> list[Sample]:  # type: ignore[override]
        raise NotImplementedError

    def prompt(self, sample: Sample) -> list[dict[str, Any]]:  # type: ignore[override]
        return sample.messages()

    def judge(self, row: Row) -> None:
        """Fills ``row.hit``, ``row.weight`` and ``row.counts``; by default a choice is right when it is the gold."""
        row.hit = float(row.answer == row.sample.gold)

    def calibration_samples(self) -> list[Sample]:
        """Samples of other scenes on which ``calibrate`` may choose something; the same for all splits of the task."""
        return []

    def calibrate(self, rows: Sequence[Row]) -> None:
        """Called with the answered calibration samples before ``aggregate``."""

    def control(self, samples: Sequence[Sample], seed: int) -> list[Sample]:
        """The same questions with the media of another cluster, each cluster's media going to one other cluster."""
        clusters = list(dict.fromkeys(s.cluster for s in samples))
        media = {s.cluster: s.media for s in samples}
        other = {c: clusters[j] for c, j in zip(clusters, derangement(len(clusters), seed), strict=True)}
        return [shuffled(s, media[other[s.cluster]]) for s in samples]

    def aggregate(self, rows: Sequence[Row]) -> list[Figure]:  # type: ignore[override]
        raise NotImplementedError


def take_clusters(samples: Sequence[Sample], clusters: int | None) -> list[Sample]:
    """The samples of the first ``clusters`` clusters; all with None."""
    kept = set(list(dict.fromkeys(s.cluster for s in samples))[:clusters])
    return [s for s in samples if s.cluster in kept]


def shuffled(sample: Sample, media: list[str]) -> Sample:
    """The control twin of a sample."""
    return Sample(sample.id, sample.cluster, media, sample.question, sample.gold, sample.choices, sample.kind, True,
                  sample.meta)  # fmt: skip


def without_media(sample: Sample) -> Sample:
    """The blind twin of a sample: the question alone."""
    return replace(sample, media=[], control=True)


def pooled_figures(
    name: str,
    rows: Sequence[Row],
    chance: float | None = None,
    better: str = "higher",
    seed: int = 0,
    of: Callable[[Row], tuple[float, float]] = lambda r: (r.hit, r.weight),
    note: str | None = None,
) -> list[Figure]:
    """``NAME`` with its interval and control; and ``NAME_over_shuffled``, the paired difference to the control.

    The control may cover a part of the samples; the difference is taken on exactly that part.

    Args:
        of: a row's share of numerator and denominator.
    """
    real, control = [r for r in rows if not r.sample.control], [r for r in rows if r.sample.control]

    def interval(some: Sequence[Row]) -> tuple[float, float, float]:
        pairs = [of(r) for r in some]
        return ratio_interval([p[0] for p in pairs], [p[1] for p in pairs], [r.sample.cluster for r in some], seed)

    value, low, high = interval(real)
    figure = Figure(name, value, better, low, high, len(real), "fraction", chance=chance, note=note)
    if not control:
        return [figure]
    figure.control, figure.control_low, figure.control_high = (_finite(x) for x in interval(control))
    if len(control) < len(real):
        figure.note = "; ".join(filter(None, (note, f"control on {len(control)} of {len(real)}")))
    by_id = {r.sample.id: r for r in real}
    pairs = [(of(by_id[c.sample.id]), of(c), c.sample.cluster) for c in control]
    gain, gain_low, gain_high = ratio_gain_interval(
        [p[0][0] for p in pairs], [p[0][1] for p in pairs], [p[1][0] for p in pairs], [p[1][1] for p in pairs],
        [p[2] for p in pairs], seed)  # fmt: skip
    over = Figure(f"{name}_over_shuffled", gain, better, gain_low, gain_high, len(pairs), "fraction",
                  note="paired difference to the shuffled control")  # fmt: skip
    return [figure, over]


def _finite(x: float) -> float | None:
    return x if x == x else None
