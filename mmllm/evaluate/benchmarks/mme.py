"""MME (Fu et al. 2023, arXiv 2306.13394): two yes/no questions per picture; score 100 (accuracy + both right)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mmllm.errors import UserError
from mmllm.evaluate.benchmarks import parsers
from mmllm.evaluate.benchmarks.base import SHORT, YES_NO, Answered, Benchmark, Style
from mmllm.evaluate.benchmarks.scores import by, grouped, ratio_sum_interval, slug, yes_no_figures
from mmllm.evaluate.tasks import Row, Sample
from mmllm.registry import register
from mmllm.report.figures import Figure

PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
PICTURES = (".jpg", ".png", ".jpeg", ".JPG", ".PNG", ".webp")
ASKS = "Please answer yes or no."


def short(question: str) -> str:
    """The question with LLaVA's request for a short answer in the place of the official one."""
    return question.replace(ASKS, "").strip() + SHORT


@register("benchmark", "mme")
class Mme(Benchmark):
    """Each task scores up to 200; perception (ten tasks) up to 2000, cognition (four) up to 800."""

    name = "mme"
    folders = ("MME", "MME_Benchmark", "MME_Benchmark_release_version")
    layout = "per task images/ and questions_answers_YN/*.txt (or both flat), each of two lines QUESTION<tab>Yes|No"
    source = "the authors of MME, github.com/BradyFU/Awesome-Multimodal-Large-Language-Models"
    styles = {
        "official": Style(lambda s: s.question, lambda text, s: parsers.yes_no_prefix(text)),
        "llava": Style(lambda s: short(s.question), lambda text, s: parsers.yes_no_prefix(text)),
        "lmms": Style(lambda s: short(s.question), lambda text, s: parsers.yes_no_start(text)),
    }
    closed = True

    def read(self) -> list[Sample]:
        out = []
        for task in (*PERCEPTION, *COGNITION):
            for path in self._files(task):
                out += self._samples(task, path)
        if not out:
            raise self.lacks("existence/questions_answers_YN/*.txt")
        return out

    def _files(self, task: str) -> list[Path]:
        folder = self.root / task
        below = folder / "questions_answers_YN"
        return sorted((below if below.is_dir() else folder).glob("*.txt"))

    def _samples(self, task: str, path: Path) -> list[Sample]:
        lines = [x for x in path.read_text(encoding="utf-8-sig").splitlines() if x.strip()]
        if len(lines) != 2:
            raise UserError(f"{len(lines)} questions on one picture, not 2", path)
        image = self.any_of(*(f"{task}/{sub}{path.stem}{end}" for end in PICTURES for sub in ("images/", "")))
        out = []
        for number, line in enumerate(lines):
            question, tab, answer = line.rpartition("\t")
            if not tab or answer.strip().lower() not in YES_NO:
                raise UserError("not QUESTION<tab>Yes or No", f"{path}:{number + 1}")
            picture = f"{task}/{path.stem}"
            out.append(Sample(f"{picture}:{number}", picture, [image], question.strip(), answer.strip().lower(), YES_NO,
                              meta={"split": task, "picture": picture}))  # fmt: skip
        return out

    def aggregate(self, rows: Sequence[Answered]) -> list[Figure]:
        tasks = by(rows, lambda r: r.sample.meta["split"])
        groups = {"perception": PERCEPTION, "cognition": COGNITION}
        out = []
        for name, members in groups.items():
            there = {str(t): some for t, some in tasks.items() if t in members}
            if there:
                note = None if len(there) == len(members) else f"only {len(there)} of {len(members)} tasks are there"
                out.append(self._figure(f"mme_{name}", there, note))
        out += [self._figure(f"mme_{slug(t)}", {str(t): some}) for t, some in tasks.items()]
        return out + [f for f in yes_no_figures("mme", rows, self.seed) if f.name in ("mme_yes_ratio", "mme_auc")]

    def _figure(self, name: str, tasks: dict[str, list[Answered]], note: str | None = None) -> Figure:
        real, control = (
            ratio_sum_interval([p for some in tasks.values() for p in _parts(some, shown)], self.seed)
            for shown in (False, True)
        )
        n = sum(not r.sample.control for some in tasks.values() for r in some)
        figure = Figure(name, *real[:1], "higher", *real[1:], n, "points", chance=75 * len(tasks), note=note)
        if all(any(r.sample.control for r in some) for some in tasks.values()):
            figure.control, figure.control_low, figure.control_high = (x if x == x else None for x in control)
        return figure


def _parts(rows: Sequence[Answered], control: bool) -> list[tuple[list[float], list[float], list[object], float]]:
    """Accuracy over the questions and over the pictures, each worth 100 points."""
    some = [r for r in rows if r.sample.control == control]
    both: Sequence[Row] = grouped(some, lambda r: r.sample.meta["picture"])
    return [([r.hit for r in each], [1.0] * len(each), [r.sample.cluster for r in each], 100.0)
            for each in (some, both)]  # fmt: skip
