"""Benchmarks on an align run: retrieval where there are captions, zero-shot classes where there are names."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmllm.errors import UserError
from mmllm.evaluate.benchmarks import get_benchmark
from mmllm.evaluate.benchmarks.base import Benchmark
from mmllm.evaluate.benchmarks.captioning import CaptionBenchmark
from mmllm.evaluate.ranking import pair_figures
from mmllm.evaluate.retrieval import ranks, zero_shot_figure
from mmllm.evaluate.stats import mean_interval
from mmllm.evaluate.tasks import Sample
from mmllm.evaluate.zero_shot import embed_classes
from mmllm.report.figures import Figure, write_figures

BATCH = 64


def run_aligned(
    run: str | Path,
    data: str | Path,
    tasks: Sequence[str],
    limit: int | None = None,
    out: str | Path | None = None,
    seed: int = 0,
    command: str = "mmllm eval",
) -> list[Figure]:
    """Retrieval both ways (captions) and zero-shot accuracy (ESC-50, class folders), as CLIP_benchmark measures them.

    A query counts when any of its own is among the first k. Equal captions of two items are not merged: there the
    other's counts as wrong. A class is the unit mean of its templates' unit embeddings.

    Args:
        run: finished align run. data, tasks, limit: as for ``run_benchmarks``.
        out: default ``bench`` in the run's folder; gets ``results.json``.

    Raises:
        UserError: a benchmark that needs a model which answers, missing files, or a run without such a stream.
    """
    from mmllm.evaluate.embed import Embedder

    start = time.monotonic()
    folder = Path(out) if out is not None else Path(run) / "bench"
    classes = {name: get_benchmark(name) for name in dict.fromkeys(tasks)}
    for name, cls in classes.items():
        if not issubclass(cls, CaptionBenchmark) and not cls.templates:
            raise UserError(f"{name} asks questions, and an align run answers none", "--align", "give --model RUN")
    benchmarks = [cls(data, None, seed, folder) for cls in classes.values()]
    samples = {b.name: b.samples(limit) for b in benchmarks}
    embedder = Embedder(run)
    figures = []
    for b in benchmarks:
        measure = zero_shot if b.templates else retrieval
        figures += measure(b, samples[b.name], embedder)
    extra = {"align": str(run), "data": str(data), "limit": limit, "seconds": round(time.monotonic() - start, 1)}
    write_figures(folder / "results.json", command, seed, None, [], figures, **extra)
    return figures


def embedded(embedder: Any, stream: str, items: Sequence[Any]) -> Tensor:
    """[N, D] of paths or texts, a batch at a time."""
    parts = [items[i : i + BATCH] for i in range(0, len(items), BATCH)]
    return torch.cat([embedder.embed(stream, [embedder.load(stream, x) for x in part]) for part in parts])


def streams_of(embedder: Any, kind: str) -> tuple[str, str]:
    """(stream of the media, its stream of texts).

    Raises:
        UserError: the run has no stream of this kind, or none of texts.
    """
    known = embedder.streams()
    media = next((s for s, field in known.items() if field == kind), None)
    if media is None:
        raise UserError(f"this run aligned no {kind}", embedder.run, f"it has: {', '.join(known)}")
    return media, embedder.query_stream("text", media)


def retrieval(benchmark: Benchmark, samples: Sequence[Sample], embedder: Any) -> list[Figure]:
    """``NAME_image_to_text_r1`` ... and back, with all captions of an item."""
    media, text = streams_of(embedder, benchmark.kind)
    captions = [(s.id, caption) for s in samples for caption in s.gold]
    embeddings = {
        benchmark.kind: embedded(embedder, media, [s.media[0] for s in samples]),
        "text": embedded(embedder, text, [caption for _, caption in captions]),
    }
    keys = {benchmark.kind: [s.id for s in samples], "text": [key for key, _ in captions]}
    return pair_figures(benchmark.name, embeddings, keys, seed=benchmark.seed)


def zero_shot(benchmark: Benchmark, samples: Sequence[Sample], embedder: Any) -> list[Figure]:
    """Accuracy of the nearest class, the share within the five nearest, and the mean of the classes' recalls."""
    media, text = streams_of(embedder, benchmark.kind)
    names = list(samples[0].choices or ())
    classes = embed_classes(lambda texts: embedded(embedder, text, texts), names, benchmark.templates)
    sim = embedded(embedder, media, [s.media[0] for s in samples]) @ classes.T
    truth, clusters = [names.index(s.gold) for s in samples], [s.cluster for s in samples]
    place = ranks(sim, truth)
    name, out = f"{benchmark.name}_zero_shot", []
    out.append(zero_shot_figure(f"{name}_accuracy", sim, truth, clusters, benchmark.seed))
    if len(names) > 5:
        value, low, high = mean_interval((place < 5).numpy(), clusters, benchmark.seed)
        out.append(Figure(f"{name}_top5", value, "higher", low, high, len(samples), "fraction", chance=5 / len(names)))
    kinds = torch.tensor(truth)
    recalls = [float((place[kinds == k] < 1).float().mean()) for k in sorted(set(truth))]
    out.append(Figure(f"{name}_mean_recall", sum(recalls) / len(recalls), n=len(recalls), unit="fraction",
                      chance=1 / len(names), note="mean over the classes"))  # fmt: skip
    return out
