"""MMBench (Liu et al. 2023, arXiv 2307.06281): choices in all rotations; right is who has all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from mmllm.errors import UserError
from mmllm.evaluate.benchmarks.base import LETTER, Answered, Benchmark, Style
from mmllm.evaluate.benchmarks.choices import by_options, letter_prompt, lettered, option_lines, options_of
from mmllm.evaluate.benchmarks.files import read_table
from mmllm.evaluate.benchmarks.scores import accuracy_figures, by, grouped, slug
from mmllm.evaluate.tasks import Sample, pooled_figures
from mmllm.registry import register
from mmllm.report.figures import Figure

# Rotations of question i have the index i + k * ROTATION in the official files.
ROTATION = 1_000_000


def official_prompt(sample: Sample) -> str:
    """The wording of the authors' evaluation kit."""
    hint = f"Hint: {sample.meta['hint']}\n" if sample.meta["hint"] else ""
    return (f"{hint}Question: {sample.question}\nOptions:\n{option_lines(options_of(sample))}\n"
            "Please select the correct answer from the options above. \n")  # fmt: skip


def lmms_prompt(sample: Sample) -> str:
    """lmms-eval's form, with hint, question and the announcement of the options in one line."""
    parts = [sample.meta["hint"], sample.question, "There are several options:"]
    return f"{' '.join(p for p in parts if p)}\n{option_lines(options_of(sample))}{LETTER}"


def rotations(options: dict[str, str]) -> list[dict[str, str]]:
    """The options in every rotation, letters staying in place; the first is as given."""
    words = list(options.values())
    return [lettered(words[k:] + words[:k]) for k in range(len(words))]


@register("benchmark", "mmbench")
class MmBench(Benchmark):
    """Leftovers that the letter rule cannot read count as wrong; no language model is asked to guess at them.

    Files without rotated rows get them here, as the authors' kit does. A file without answers is the hidden test part.
    """

    name = "mmbench"
    folders = ("MMBench",)
    layout = "one TSV with the columns index, question, hint, A, B, C, D, answer, category, image (base64)"
    source = "the OpenCompass downloads of github.com/open-compass/MMBench (mmbench_dev_en.tsv)"
    styles = {
        "official": Style(official_prompt, by_options, 32, note="no judge for answers without a letter"),
        "llava": Style(letter_prompt, by_options, 16, note="no judge for answers without a letter"),
        "lmms": Style(lmms_prompt, by_options, 256, note="no judge for answers without a letter"),
    }
    closed = True

    def read(self) -> list[Sample]:
        path = self.need("*mmbench*.tsv", "*MMBench*.tsv", "*.tsv")
        rows = read_table(path, "index", "question", "A", "B", "image", delimiter="\t")
        if rows and not any(r.get("answer") for r in rows):
            raise UserError("this part has no answers (hidden test labels)", path, "use the dev file")
        own = Counter(int(r["index"]) % ROTATION for r in rows)
        official = any(n > 1 for n in own.values())
        pictures = {r["index"]: r["image"] for r in rows}
        return [s for r in rows for s in self._samples(r, pictures, not official)]

    def _samples(self, row: dict[str, str], pictures: dict[str, str], rotate: bool) -> list[Sample]:
        index = int(row["index"])
        picture = row["image"]
        # A short entry is the index of the row that holds the picture.
        picture = pictures.get(picture, picture) if len(picture) < 64 else picture
        media = [self.keep_picture(picture, index)]
        options = {x: row[x] for x in "ABCD" if row.get(x) and row[x] != "nan"}
        hint = row.get("hint") or ""
        out = []
        for turn, turned in enumerate(rotations(options) if rotate else [options]):
            right = next((x for x, words in turned.items() if words == options.get(row["answer"])), None)
            meta = {"options": turned, "hint": "" if hint == "nan" else hint, "question_id": index % ROTATION,
                    "first": turn == 0 and index < ROTATION, "category": row.get("category", ""),
                    "l2": row.get("l2-category", "")}  # fmt: skip
            answer = row["answer"] if turn == 0 else right
            out.append(Sample(str(index + turn * ROTATION), str(index % ROTATION), media, row["question"], answer,
                              list(turned), meta=meta))  # fmt: skip
        return out

    def aggregate(self, rows: Sequence[Answered]) -> list[Figure]:
        circular = grouped(rows, lambda r: r.sample.meta["question_id"])
        first = [r for r in rows if r.sample.meta["first"]]
        out = pooled_figures("mmbench_circular", circular, _chance(rows), seed=self.seed, note="all rotations right")
        out += accuracy_figures("mmbench", first, self.seed, note="the unrotated questions alone")
        for key in ("l2", "category"):
            for name, some in by(rows, lambda r, key=key: r.sample.meta[key]).items():
                groups = grouped(some, lambda r: r.sample.meta["question_id"])
                out += pooled_figures(f"mmbench_circular_{slug(name)}", groups, seed=self.seed)[:1]
        return list({f.name: f for f in out}.values())


def _chance(rows: Sequence[Answered]) -> float:
    """Guessing all rotations of a question, on average."""
    counts = {r.sample.meta["question_id"]: len(r.sample.choices or ()) for r in rows}
    return sum(n**-n for n in counts.values()) / max(len(counts), 1)
