"""What every benchmark shares: files in their official layout, styles that fix prompt and parser, and judged rows."""

from __future__ import annotations

import base64
import binascii
import hashlib
import math
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmllm.contracts import Task
from mmllm.errors import UserError, unknown
from mmllm.evaluate.benchmarks.files import find_root
from mmllm.evaluate.stats import derangement
from mmllm.evaluate.tasks import Row, Sample, shuffled
from mmllm.report.figures import Figure

# The suffixes with which LLaVA asks for short answers and for letters; most later work took them over.
SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
YES_NO = ["yes", "no"]
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SCORED = "scored"
COCO = ("val2014/", "train2014/", "val2017/", "train2017/")


@dataclass(frozen=True)
class Style:
    """Prompt and parser together: scores of two styles are not comparable.

    Attributes:
        prompt: sample -> words of the user's turn.
        parse: (answer, sample) -> what is compared with the truth, None where the rule cannot tell.
        max_new_tokens: limit of the answer.
        scored: the answer is the most probable of the sample's choices; nothing is generated.
        note: one line that a reader of the figures must know.
    """

    prompt: Callable[[Sample], str]
    parse: Callable[[str, Sample], Any]
    max_new_tokens: int = 16
    scored: bool = False
    note: str | None = None


@dataclass
class Answered(Row):
    """An answered and parsed sample.

    Attributes:
        parsed: what the style's parser made of the answer; None: it accepted nothing.
        prompt: the words that were asked.
    """

    parsed: Any = None
    prompt: str = ""

    @property
    def margin(self) -> float | None:
        """Yes minus no, in nats; of other choices the true one minus the best other; None without scores."""
        choices = self.sample.choices
        if self.scores is None or not choices:
            return None
        if choices == YES_NO:
            return self.scores[0] - self.scores[1]
        true = [s for c, s in zip(choices, self.scores, strict=True) if c == self.sample.gold]
        false = [s for c, s in zip(choices, self.scores, strict=True) if c != self.sample.gold]
        return true[0] - max(false) if true and false else None

    def to_dict(self, task: str) -> dict[str, Any]:
        """The line of predictions.jsonl."""
        margin = self.margin
        return {
            **super().to_dict(task),
            "split": self.sample.meta.get("split", "test"),
            "prompt": self.prompt,
            "parsed": self.parsed,
            "unparsed": self.parsed is None,
            "control_kind": ("shuffled" if self.sample.media else "blind") if self.sample.control else None,
            "margin": None if margin is None or not math.isfinite(margin) else round(margin, 5),
        }


class Benchmark(Task):
    """One benchmark in its official layout; subclasses are registered as ("benchmark", name).

    Attributes:
        folders: names under which its folder may stand in the data folder; the data folder itself will do as well.
        layout: the files it needs, in words. source: where users get them.
        styles: by name; the first is taken when none is asked for.
        kind: "image" or "audio".
        may_lack_media: media that are not there are left out and counted instead of being an error.
        parses: False where every answer is accepted (captions), so that nothing can be unparsed.
        templates: how an align run puts a class into words, ``{}`` for its name; none: it is not measured on classes.
    """

    folders: tuple[str, ...] = ()
    layout: str = ""
    source: str = ""
    styles: dict[str, Style] = {}
    kind: str = "image"
    may_lack_media: bool = False
    parses: bool = True
    closed: bool = False
    templates: tuple[str, ...] = ()

    def __init__(
        self, data: str | Path, style: str | None = None, seed: int = 0, scratch: str | Path | None = None
    ) -> None:
        """
        Args:
            data: folder that holds the benchmark's folder, or that folder.
            style: a name in ``styles``, or ``scored`` where the choices are known.
            seed: for what the benchmark draws.
            scratch: folder for pictures that the files hold inside them; default, one for temporary files.

        Raises:
            UserError: unknown style.
        """
        self.root = find_root(Path(data), (*self.folders, self.name))
        self.seed, self.lacking = seed, 0
        self.scratch = Path(scratch) if scratch is not None else Path(tempfile.gettempdir()) / "mmllm"
        self.style_name = style or next(iter(self.styles))
        self.style = self.pick_style(self.style_name)

    @classmethod
    def style_names(cls) -> list[str]:
        return [*cls.styles, *([SCORED] if cls.closed else [])]

    @classmethod
    def pick_style(cls, name: str) -> Style:
        """The style of a name.

        Raises:
            UserError: the benchmark has no such style.
        """
        if name == SCORED and cls.closed:
            first = next(iter(cls.styles.values()))
            return Style(first.prompt, lambda text, sample: text, 0, True, "the most probable choice")
        if name not in cls.styles:
            raise unknown(f"style of {cls.name}", name, cls.style_names(), "--style")
        return cls.styles[name]

    def read(self) -> list[Sample]:
        """All samples with the raw question and everything that styles need in ``meta``."""
        raise NotImplementedError

    def samples(self, limit: int | None = None) -> list[Sample]:  # type: ignore[override]
        """The samples to be asked, checked.

        Args:
            limit: most clusters of each split.

        Raises:
            UserError: nothing to ask, an id twice, or media that are not there.
        """
        samples = self.read()
        twice = [x for x, n in Counter((split_of(s), s.id) for s in samples).items() if n > 1]
        if twice:
            raise UserError(f"{self.name}: {len(twice)} ids stand there twice, such as {twice[0][1]}", self.root)
        samples = first_clusters(samples, limit)
        missing = [m for m in dict.fromkeys(m for s in samples for m in s.media) if not Path(m).is_file()]
        whole = [s for s in samples if set(s.media).isdisjoint(missing)]
        if missing and self.may_lack_media and whole:
            samples, self.lacking = whole, len(missing)
        elif missing:
            what = f"{self.name}: {len(missing)} files of its media are not there"
            raise UserError(what, missing[0], f"expected: {self.layout}; get them from {self.source}")
        if not samples:
            raise UserError(f"nothing to ask for {self.name}", self.root, f"expected: {self.layout}")
        return samples

    def words(self, sample: Sample) -> str:
        """The words of the prompt."""
        return self.style.prompt(sample)

    def prompt(self, sample: Sample) -> list[dict[str, Any]]:  # type: ignore[override]
        words = self.words(sample)
        if not sample.media:
            return [{"role": "user", "content": [{"type": "text", "text": words}]}]
        return Sample(sample.id, sample.cluster, sample.media, words, None, kind=sample.kind).messages()

    def parse(self, answer: str, sample: Sample) -> Any:  # type: ignore[override]
        return self.style.parse(answer, sample)

    def judge(self, row: Answered) -> None:
        """Fills ``row.hit``, ``row.weight`` and ``row.counts``; by default right means parsed as the truth."""
        row.hit = float(row.parsed == row.sample.gold)

    def control(self, samples: Sequence[Sample], seed: int, blind: bool = False) -> list[Sample]:
        """The same questions about another cluster's media, or about none; samples without media have no control."""
        shown = [s for s in samples if s.media]
        if blind:
            return [shuffled(s, []) for s in shown]
        media = {s.cluster: s.media for s in shown}
        clusters = list(media)
        other = {c: clusters[j] for c, j in zip(clusters, derangement(len(clusters), seed), strict=True)}
        return [shuffled(s, media[other[s.cluster]]) for s in shown] if len(clusters) > 1 else []

    def aggregate(self, rows: Sequence[Answered]) -> list[Figure]:  # type: ignore[override]
        raise NotImplementedError

    # Files.

    def need(self, *patterns: str) -> Path:
        """The first file (or folder) below the root that one of the patterns finds.

        Raises:
            UserError: none of them does; names the file, the layout and where to get it.
        """
        for pattern in patterns:
            found = sorted(self.root.glob(pattern))
            if found:
                return found[0]
        raise self.lacks(patterns[0])

    def lacks(self, name: str) -> UserError:
        what = f"{self.name}: no {name} here"
        return UserError(what, self.root, f"expected: {self.layout}; get it from {self.source}")

    def any_of(self, *paths: str) -> str:
        """The first of the paths (relative to the root) that is a file; the first one when none is.

        Pictures of COCO may also stand in a folder ``coco`` beside the root, for all benchmarks that use them.
        """
        coco = [f"../{name}/{p}" for p in paths if p.startswith(COCO) for name in ("coco", "COCO")]
        full = [os.path.normpath(self.root / p) for p in (*paths, *coco)]
        return next((p for p in full if Path(p).is_file()), full[0])

    def keep_picture(self, encoded: str | bytes, name: object) -> str:
        """Writes a picture that a table holds (base64 or bytes) into the scratch folder once; its path.

        Raises:
            UserError: not base64.
        """
        try:
            data = encoded if isinstance(encoded, bytes) else base64.b64decode(encoded, validate=True)
        except (binascii.Error, ValueError):
            raise UserError(f"{self.name}: the picture of item {name} is not base64", self.root) from None
        path = self.scratch / "media" / f"{hashlib.sha256(data).hexdigest()[:24]}.png"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return str(path)


def split_of(sample: Sample) -> str:
    return str(sample.meta.get("split", "test"))


def first_clusters(samples: Sequence[Sample], limit: int | None) -> list[Sample]:
    """The samples of the first ``limit`` clusters of each split; all with None."""
    if limit is None:
        return list(samples)
    kept: dict[str, dict[str, None]] = {}
    for s in samples:
        clusters = kept.setdefault(split_of(s), {})
        if len(clusters) < limit:
            clusters[s.cluster] = None
    return [s for s in samples if s.cluster in kept[split_of(s)]]
