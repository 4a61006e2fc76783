"""Puts the questions to the model under every condition; each portion of pictures is kept, so a night may end early."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from mmllm.evaluate.answer import Progress
from mmllm.evaluate.tasks import Sample
from mmllm.train.disk import write_json

PICTURES = 8  # a portion's pictures when scoring: what a kill may cost
CAPTIONS = 16  # a portion's captions


def picture_portions(samples: Sequence[Sample], pictures: int) -> list[list[Sample]]:
    """Samples of the same picture together, ``pictures`` pictures a portion."""
    ordered = sorted(samples, key=lambda s: (s.media, s.id))
    groups = [list(g) for _, g in groupby(ordered, key=lambda s: s.media)]
    return [sum(groups[i : i + pictures], []) for i in range(0, len(groups), pictures)]


def request_seed(sample: Sample, seed: int) -> int:
    """One seed per picture: its questions share the views that noise makes of it, whatever else is asked."""
    return zlib.crc32(Path(sample.media[0]).name.encode()) ^ seed


def score(decoder: Callable[[], Any], samples: Sequence[Sample], specs: Sequence[str], folder: Path, seed: int) -> None:
    """Writes the margin, log-probability of yes minus that of no, of every sample under every spec.

    All specs of a picture go to the decoder together, so that it computes what they share once.

    Args:
        decoder: makes it, when anything is left to do.
        folder: gets ``scores-00000.json``, ...; portions that are there stay.
    """
    from mmllm.decode import Request

    portions = picture_portions(samples, PICTURES)
    progress = Progress(len(samples) * len(specs))
    for i, portion in enumerate(portions):
        file = folder / f"scores-{i:05d}.json"
        if not file.is_file():
            asked = [(s, spec) for s in portion for spec in specs]
            requests = [Request(s.messages(), spec, seed=request_seed(s, seed)) for s, spec in asked]
            found = decoder().score(requests, [s.choices or [] for s, _ in asked])
            margins = [round(float(yes - no), 6) for yes, no in found]
            table = np.array(margins).reshape(len(portion), len(specs)).tolist()
            write_json(file, {"specs": list(specs), "margins": {s.id: row for s, row in zip(portion, table)}})
        progress.add(len(portion) * len(specs))


def read_margins(folder: Path, samples: Sequence[Sample], specs: Sequence[str]) -> dict[str, np.ndarray]:
    """What ``score`` wrote: spec -> margins [n] in the order of the samples."""
    rows: dict[str, list[float]] = {}
    for file in sorted(folder.glob("scores-*.json")):
        rows |= json.loads(file.read_text(encoding="utf-8"))["margins"]
    table = np.array([rows[s.id] for s in samples])
    return {spec: table[:, k] for k, spec in enumerate(specs)}


def describe(
    decoder: Callable[[], Any], samples: Sequence[Sample], specs: Sequence[str], folder: Path, seeds: Sequence[int],
    max_new_tokens: int,
) -> None:  # fmt: skip
    """Writes a caption of every sample under every spec; ``seeds`` are those of decoding, one where nothing is drawn.

    Args:
        folder: gets ``captions-00000.json``, ...; portions that are there stay.
    """
    from mmllm.decode import Request, parse_spec

    asked = [
        (s, spec, seed) for spec in specs for seed in (seeds if parse_spec(spec).do_sample else seeds[:1])
        for s in samples
    ]  # fmt: skip
    progress = Progress(len(asked))
    for start in range(0, len(asked), CAPTIONS):
        portion = asked[start : start + CAPTIONS]
        file = folder / f"captions-{start // CAPTIONS:05d}.json"
        if not file.is_file():
            requests = [Request(s.messages(), spec, max_new_tokens, seed=request_seed(s, seed))
                        for s, spec, seed in portion]  # fmt: skip
            results = decoder().generate(requests)
            write_json(file, [
                {"id": s.id, "spec": spec, "seed": seed, "text": r.text, "tokens": len(r.token_ids)}
                for (s, spec, seed), r in zip(portion, results, strict=True)
            ])  # fmt: skip
        progress.add(len(portion))


def read_captions(folder: Path) -> list[dict[str, Any]]:
    """What ``describe`` wrote: id, spec, seed, text and tokens of each caption."""
    return [row for file in sorted(folder.glob("captions-*.json")) for row in json.loads(file.read_text("utf-8"))]
