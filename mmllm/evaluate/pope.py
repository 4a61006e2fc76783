"""POPE from composed scenes: balanced questions about present and absent things, parsers, and the yes/no figures."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np

from mmllm.data.questions import exists, with_article
from mmllm.errors import UserError, unknown
from mmllm.evaluate.benchmarks.parsers import yes_no_exact, yes_no_official, yes_no_word
from mmllm.evaluate.stats import auc_interval, best_threshold
from mmllm.evaluate.tasks import EvalTask, Row, Sample, pooled_figures
from mmllm.registry import register
from mmllm.report.figures import Figure

KINDS = ("random", "popular", "adversarial")
RULES = {"official": yes_no_official, "lmms": yes_no_exact, "strict": yes_no_word}


def labels_of(scene: dict[str, Any]) -> list[str]:
    """The different things in a scene record, in the order of its boxes."""
    return list(dict.fromkeys(box["text"] for box in scene["boxes"]))


def official_question(label: str) -> str:
    """The wording of the POPE files, with the right article."""
    return f"Is there {with_article(label)} in the image?"


def pope_questions(
    scenes: Sequence[dict[str, Any]],
    kind: str,
    seed: int,
    vocabulary: Iterable[str] | None = None,
    pairs: int = 3,
    cooccur_from: Sequence[dict[str, Any]] | None = None,
    question: Callable[[str], str] = official_question,
) -> list[dict[str, Any]]:
    """POPE questions (Li et al. 2023, arXiv 2305.10355) in the official form, from scenes with exact contents.

    Of each scene up to ``pairs`` present things are asked for, in random order, each followed by an absent one:
    ``random`` draws it evenly, ``popular`` takes the most frequent absent thing, ``adversarial`` the absent thing that
    stands most often beside the positive just asked (a random one when none ever does). Nothing is asked twice about
    a scene, and yes and no are balanced within each scene. The positives are the same for all kinds.

    Args:
        scenes: records with ``id``, ``image`` and ``boxes`` (``text`` of each is its name).
        kind: one of random, popular, adversarial.
        vocabulary: names that may be absent; default, all names in ``scenes``.
        cooccur_from: scenes whose statistics define popular and adversarial (for instance the training scenes);
            default, ``scenes`` themselves as in the paper.

    Returns:
        rows with ``question_id`` (from 1), ``image``, ``text``, ``label`` ("yes" or "no"), and beside the official
        keys ``scene`` (id) and ``object``.

    Raises:
        UserError: unknown kind.
    """
    if kind not in KINDS:
        raise unknown("POPE kind", kind, KINDS)
    statistics = [labels_of(s) for s in (scenes if cooccur_from is None else cooccur_from)]
    names = sorted(set(vocabulary) if vocabulary is not None else {x for s in scenes for x in labels_of(s)})
    frequency = Counter(x for things in statistics for x in things)
    together: dict[str, Counter[str]] = defaultdict(Counter)
    for things in statistics:
        for a, b in permutations(things, 2):
            together[a][b] += 1
    popular = sorted(names, key=lambda x: (-frequency[x], x))

    rows: list[dict[str, Any]] = []
    for index, scene in enumerate(scenes):
        present = labels_of(scene)
        order = np.random.default_rng((seed, index)).permutation(len(present))
        rng = np.random.default_rng((seed, index, 1))
        absent = [x for x in names if x not in set(present)]
        for position in order[:pairs]:
            positive = present[position]
            if not absent:
                break
            negative = absent[int(rng.integers(len(absent)))]
            if kind == "popular":
                negative = next(x for x in popular if x in absent)
            elif kind == "adversarial":
                beside = max(absent, key=lambda x: (together[positive][x], -popular.index(x)))
                negative = beside if together[positive][beside] else negative
            absent.remove(negative)
            for thing, label in ((positive, "yes"), (negative, "no")):
                rows.append({"question_id": len(rows) + 1, "image": scene["image"], "text": question(thing),
                             "label": label, "scene": scene["id"], "object": thing})  # fmt: skip
    return rows


def write_pope(path: str | Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes the official JSON-lines file: question_id, image, text, label."""
    keys = ("question_id", "image", "text", "label")
    lines = [json.dumps({k: str(row[k]) if k == "image" else row[k] for k in keys}, ensure_ascii=False) for row in rows]
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")


def parse_yes_no(text: str, style: str = "strict") -> str | None:
    """ "yes", "no", or None where the style admits that it cannot tell.

    Args:
        style: ``official`` is the script of the POPE authors (first sentence, commas dropped; a word No, no or not
            means no, anything else yes, even nothing at all); ``lmms`` takes only a bare yes or no, as lmms-eval does;
            ``strict`` wants exactly one of the words yes and no.

    Raises:
        UserError: unknown style.
    """
    if style in RULES:
        return RULES[style](text)
    raise unknown("answer style", style, RULES)


def yes_no_metrics(answers: Sequence[str | None], labels: Sequence[str]) -> dict[str, float]:
    """accuracy, precision, recall, f1 (positive = yes) and yes_ratio; an answer of None is wrong and counts as no yes.

    Ratios with an empty denominator are 0, so that always saying no gives recall 0 and F1 0.
    """
    said, truth = np.array([a == "yes" for a in answers]), np.array([x == "yes" for x in labels])
    right = np.array([a == x for a, x in zip(answers, labels, strict=True)])
    hits = float((said & truth).sum())
    precision = hits / said.sum() if said.any() else 0.0
    recall = hits / truth.sum() if truth.any() else 0.0
    f1 = 2 * precision * recall / (precision + recall) if hits else 0.0
    n = max(len(right), 1)
    return {"accuracy": float(right.sum() / n), "precision": float(precision), "recall": float(recall),
            "f1": float(f1), "yes_ratio": float(said.sum() / n)}  # fmt: skip


def _short_question(label: str) -> str:
    return exists(label, True).question


def margin(row: Row) -> float:
    """Log-probability of yes minus that of no."""
    assert row.scores is not None
    return row.scores[0] - row.scores[1]


@register("task", "pope")
class PopeTask(EvalTask):
    """Yes/no questions about present and absent things, answered by the more probable of the two words.

    The random kind is asked of all scenes, popular and adversarial of the first ``hard_scenes``. Beside the plain
    accuracy stand the AUC of the margin, which no leaning to one answer can change, and the accuracy with a threshold
    chosen on validation scenes (``align/regions_val.jsonl``), never on the scenes that are judged.
    """

    hard_scenes = 100
    calibration_scenes = 80
    threshold: float | None = None

    def _questions(self, scenes: Sequence[dict[str, Any]], kinds: Sequence[str], prefix: str = "") -> list[Sample]:
        """One sample per (scene, object); ``meta["kinds"]`` says in which kinds it is asked."""
        samples: dict[str, Sample] = {}
        for kind in kinds:
            part = scenes if kind == "random" else scenes[: self.hard_scenes]
            for row in pope_questions(part, kind, self.data.seed, question=_short_question):
                key = f"{prefix}{row['scene']}:{row['object']}"
                if key not in samples:
                    samples[key] = Sample(key, str(row["scene"]), [str(row["image"])], row["text"], row["label"],
                                          ["yes", "no"], meta={"object": row["object"], "kinds": []})  # fmt: skip
                samples[key].meta["kinds"].append(kind)
        return list(samples.values())

    def samples(self) -> list[Sample]:
        return self._questions(self.data.scenes(self.split), KINDS)

    def calibration_samples(self) -> list[Sample]:
        """Random-kind questions on validation scenes.

        Raises:
            UserError: one of them is also among the judged pictures.
        """
        if not self.data.has("align/regions_val.jsonl"):
            return []
        scenes = self.data.records("align/regions_val.jsonl")[: self.calibration_scenes]
        judged = {str(s["image"]) for split in self.data.splits() for s in self.data.scenes(split)}
        if any(str(s["image"]) in judged for s in scenes):
            raise UserError("validation scenes are also judged scenes", self.data.root, "build the dataset again")
        return self._questions(scenes, ["random"], "val:")

    def calibrate(self, rows: Sequence[Row]) -> None:
        if rows:
            self.threshold = best_threshold([margin(r) for r in rows], [r.sample.gold == "yes" for r in rows])

    def judge(self, row: Row) -> None:
        said, true = row.answer == "yes", row.sample.gold == "yes"
        row.hit = float(said == true)
        row.counts = {"yes": float(said), "true": float(true), "both": float(said and true)}

    def aggregate(self, rows: Sequence[Row]) -> list[Figure]:
        seed, split = self.data.seed, self.split
        by_kind = {k: [r for r in rows if k in r.sample.meta["kinds"]] for k in KINDS}
        figures = pooled_figures(f"pope_accuracy_{split}", by_kind["random"], 0.5, seed=seed, note="random kind")
        for kind in KINDS[1:]:
            figures += pooled_figures(f"pope_accuracy_{split}_{kind}", by_kind[kind], 0.5, seed=seed)[:1]
        plain = by_kind["random"]
        if self.threshold is not None:
            t = self.threshold
            figures += pooled_figures(
                f"pope_accuracy_{split}_calibrated", plain, 0.5, seed=seed,
                of=lambda r: (float((margin(r) > t) == (r.sample.gold == "yes")), 1.0),
                note=f"yes when its margin is above {t:.3f}, chosen on other (validation) scenes")[:1]  # fmt: skip

        def f1(r: Row) -> tuple[float, float]:
            return 2 * r.counts["both"], r.counts["yes"] + r.counts["true"]

        def said_yes(r: Row) -> tuple[float, float]:
            return r.counts["yes"], 1.0

        figures += pooled_figures(f"pope_f1_{split}", plain, 2 / 3, "higher", seed, f1, "chance: always yes")[:1]
        note = "0.5 leans to neither side"
        figures += pooled_figures(f"pope_yes_ratio_{split}", plain, 0.5, "higher", seed, said_yes, note)[:1]
        return [*figures, auc_figure(f"pope_auc_{split}", plain, seed)]


def auc_figure(name: str, rows: Sequence[Row], seed: int) -> Figure:
    """AUC of the yes-no margin with its interval, and that of the shuffled control."""
    parts = []
    for control in (False, True):
        some = [r for r in rows if r.sample.control == control]
        parts.append(auc_interval([margin(r) for r in some], [r.sample.gold == "yes" for r in some],
                                  [r.sample.cluster for r in some], seed))  # fmt: skip
    (value, low, high), (control, control_low, control_high) = parts
    n = sum(not r.sample.control for r in rows)
    return Figure(name, value, "higher", low, high, n, "fraction", control, control_low, control_high, 0.5)
