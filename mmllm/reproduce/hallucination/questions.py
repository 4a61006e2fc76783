"""The questions of the hallucination experiment: POPE on each set, twins, and what a decoding method is judged by."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmllm.data.planted import Prior
from mmllm.data.questions import caption, exists
from mmllm.data.records import read_records
from mmllm.evaluate.pope import KINDS, labels_of, pope_questions
from mmllm.evaluate.tasks import Sample

# What a question is asked for; one question may serve several.
ADVERSARIAL = "twins_adversarial"  # the primary endpoint's: POPE-adversarial where the prior says nothing true
PAIRS = "pairs"  # "Is there a B?" of both twins
OTHER = "other"  # the same picture's question about a B whose A is not there either
NATURAL = tuple(f"natural_{kind}" for kind in KINDS)
SWAPPED = "swapped_adversarial"


def question(label: str) -> str:
    """The wording that was trained."""
    return exists(label, True).question


def read_scenes(folder: Path, name: str) -> list[dict[str, Any]]:
    """Scene records of a set, ``image`` an absolute path."""
    return list(read_records(folder / "eval" / f"{name}.jsonl"))


def one_of_each(scenes: Sequence[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """One member of each pair of twins, so that its B is there with probability a half, whatever else is."""
    rng = np.random.default_rng((seed, 41))
    return [scenes[2 * i + int(rng.integers(2))] for i in range(len(scenes) // 2)]


def cluster_of(scene: dict[str, Any]) -> str:
    """Twins are one picture as far as statistics go."""
    return str(scene["id"]).removesuffix("_shown").removesuffix("_hidden")


class Questions:
    """Questions gathered by (scene, object), so that none is asked twice however many uses it has."""

    def __init__(self) -> None:
        self.samples: dict[str, Sample] = {}

    def ask(self, use: str, scene: dict[str, Any], label: str, **meta: Any) -> None:
        key = f"{scene['id']}:{label}"
        if key not in self.samples:
            gold = "yes" if label in labels_of(scene) else "no"
            media = [str(scene["image"])]
            self.samples[key] = Sample(key, cluster_of(scene), media, question(label), gold, ["yes", "no"],
                                       meta={"object": label, "uses": []})  # fmt: skip
        self.samples[key].meta["uses"].append(use)
        self.samples[key].meta.update(meta)

    def pope(
        self, use: str, scenes: Sequence[dict[str, Any]], kind: str, prior: Prior, train: Sequence[dict[str, Any]],
        seed: int,
    ) -> None:  # fmt: skip
        """POPE questions of one kind, with what stands together in training deciding what is adversarial."""
        by_id = {str(s["id"]): s for s in scenes}
        for row in pope_questions(scenes, kind, seed, prior.labels, cooccur_from=train, question=question):
            self.ask(use, by_id[str(row["scene"])], row["object"])

    def twins(self, scenes: Sequence[dict[str, Any]], prior: Prior, seed: int) -> None:
        """Both twins: is there a B? And the hidden one: is there the B of another A, where neither of them is?"""
        for i, scene in enumerate(scenes):
            a, b, twin = scene["meta"]["a"], scene["meta"]["b"], scene["meta"]["twin"]
            self.ask(PAIRS, scene, b, twin=twin, pair=cluster_of(scene))
            if twin == "hidden":
                rng = np.random.default_rng((seed, 42, i))
                here = labels_of(scene)
                free = [y for x, y in prior.pairs if x != a and x not in here and y not in here]
                if free:
                    self.ask(OTHER, scene, free[int(rng.integers(len(free)))])


def test_questions(folder: Path, prior: Prior, seed: int) -> list[Sample]:
    """All yes/no questions that methods are judged by."""
    train = list(read_records(folder / "align" / "regions_train.jsonl"))
    asked = Questions()
    twins = read_scenes(folder, "twins")
    asked.pope(ADVERSARIAL, one_of_each(twins, seed), "adversarial", prior, train, seed)
    asked.twins(twins, prior, seed)
    for kind, use in zip(KINDS, NATURAL):
        asked.pope(use, read_scenes(folder, "natural"), kind, prior, train, seed)
    asked.pope(SWAPPED, read_scenes(folder, "swapped"), "adversarial", prior, train, seed)
    return list(asked.samples.values())


def dev_questions(folder: Path, prior: Prior, seed: int) -> list[Sample]:
    """The questions that settings are chosen by: other cut-outs, other scenes."""
    train = list(read_records(folder / "align" / "regions_train.jsonl"))
    asked = Questions()
    asked.pope(ADVERSARIAL, one_of_each(read_scenes(folder, "dev_twins"), seed), "adversarial", prior, train, seed)
    return list(asked.samples.values())


def caption_samples(scenes: Sequence[dict[str, Any]]) -> list[Sample]:
    """A free caption of each scene; gold: the things in it."""
    return [
        Sample(str(s["id"]), cluster_of(s), [str(s["image"])], caption(s["boxes"]).question, labels_of(s))
        for s in scenes
    ]


def used_for(samples: Sequence[Sample], use: str) -> np.ndarray:
    """[n] bool: the samples with this use."""
    return np.array([use in s.meta["uses"] for s in samples], bool)
