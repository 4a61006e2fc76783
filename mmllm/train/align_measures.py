"""Measures an aligned model on held-out records: retrieval, zero-shot classes, words at the objects' cells.

Others join by ``@register("measure", NAME)`` on a function ``(stage, measure, records, **options) -> [Figure]``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmllm.align.config import MeasureConfig, SourceConfig
from mmllm.align.objectives import centre_cell
from mmllm.align.reading import FIELD
from mmllm.align.record_keys import texts_of
from mmllm.blocks.replay import Moment
from mmllm.contracts import Scorer, StepHook, Stream
from mmllm.errors import UserError, unknown
from mmllm.evaluate.geometry import geometry_figures
from mmllm.evaluate.nearest import nearest_page
from mmllm.evaluate.probes import probe_figures
from mmllm.evaluate.ranking import Rows, pair_figures
from mmllm.evaluate.retrieval import retrieval_figures, zero_shot_figure
from mmllm.evaluate.stats import derangement, mean_interval
from mmllm.evaluate.zero_shot import embed_classes
from mmllm.registry import get, make, register
from mmllm.report.figures import Figure
from mmllm.train.launch import is_main

if TYPE_CHECKING:
    from mmllm.train.align import AlignStage


def measure_all(stage: AlignStage) -> list[Figure]:
    """All figures of the config's ``measures``; a data file that the data set lacks is named and left out."""
    return [f for measure in stage.config.measures.values() for f in measured(stage, measure)]


def measured(stage: AlignStage, measure: MeasureConfig) -> list[Figure]:
    """The figures of one measure."""
    files = [measure.data] if isinstance(measure.data, str) else measure.data
    present = [f for f in files if (stage.folder / f).is_file()]
    for missing in sorted(set(files) - set(present)):
        stage.notice(f"measure '{measure.name}': the data set has no {missing}")
    records = stage.records(present, measure.recipes) if present else []
    if not records:
        return [Figure(measure.name, None, note="no data: " + ", ".join(files))]
    return with_targets(measure, kind_of(measure)(stage, measure, records, **measure.options))


def kind_of(measure: MeasureConfig) -> Callable[..., list[Figure]]:
    """The function of a measure's kind: ``fn(stage, measure, records, **options) -> figures``.

    Raises:
        UserError: unknown kind or option.
    """
    where = f"measure '{measure.name}'"
    found = get("measure", measure.kind, where)
    valid = list(inspect.signature(found).parameters)[3:]
    for key in measure.options:
        if key not in valid:
            raise unknown("option", key, valid, where)
    return found


class MeasureHook(StepHook):
    """Measures during training, every ``every`` steps, and writes the fractions into ``metrics.jsonl`` for the curves.

    It changes nothing of the training: random states and modes are as they were afterwards.
    """

    def __init__(self, stage: AlignStage, phase: str):
        self.stage, self.phase = stage, phase
        self.measures = [m for m in stage.config.measures.values() if m.every]

    def before_forward(self, model: Any, batch: Any, step: int) -> None:
        due = [m for m in self.measures if m.every and step and step % m.every == 0]
        if not due or not is_main() or self._stands(step):
            return
        row: dict[str, Any] = {"step": step, "phase": self.phase}
        shown = list(self.stage.nearest)
        with Moment().again():
            model.eval()
            for measure in due:
                row |= {f.name: f.value for f in measured(self.stage, measure) if f.unit == "fraction"}
            model.train()
        self.stage.run.log(row)
        self.stage.nearest = shown  # the page shows the end alone

    def _stands(self, step: int) -> bool:
        """Whether this step was measured before: by an earlier micro-batch, or by the run that this one resumes."""
        names = tuple(m.name for m in self.measures)
        rows = [r for r in self.stage.run.read_metrics() if r["step"] == step and r.get("phase", "") == self.phase]
        return any(k.startswith(names) for r in rows for k in r)


def with_targets(measure: MeasureConfig, figures: list[Figure]) -> list[Figure]:
    """The figures, those of ``times_chance`` with their target and verdict.

    Raises:
        UserError: a figure that the measure does not have, or one without chance.
    """
    by_name = {f.name.removeprefix(f"{measure.name}_"): f for f in figures}
    for name, factor in measure.times_chance.items():
        where = f"measure '{measure.name}', times_chance"
        if name not in by_name:
            raise unknown("figure", name, by_name, where)
        figure = by_name[name]
        if figure.chance is None:
            raise UserError(f"'{name}' has no chance level", where)
        figure.target = factor * figure.chance
        figure.verdict = "met" if (figure.value or 0.0) >= figure.target else "missed"
    return figures


@torch.no_grad()
def plain_embeddings(
    stage: AlignStage, measure: MeasureConfig, records: list[dict[str, Any]], kind: str, stream: str | None = None
) -> tuple[Tensor, Tensor | None, Any]:
    """Unaugmented embeddings of a stream (the query stream): [N, P], or tokens [N, M, D] with their grid."""
    stream = measure.streams[0] if stream is None else stream
    tower = stage.model.tower(stream)
    whole = any(record.get("boxes") is not None for record in records)  # a scene is no cut-out that needs a canvas
    augment = augment_of(stage, stream) if tower.modality == "vision" and not whole else "none"
    field = "tokens" if kind == "token_embedding" else "pooled"
    size = measure.image_size or stage.model.image_size.get(stream)
    found = stage.frozen(
        tower,
        records,
        [field],
        image_size=size,
        augment=augment if augment == "cutout" else "none",
        name=measure.name,
        frames=measure.frames,
    )
    rows, mask, grid = [], [], None
    for i in range(0, len(records), 256):
        inputs: dict[str, Any] = {k: v[0, i : i + 256] for k, v in found.items()}
        if field == "tokens" and tower.modality == "vision":
            side = round(inputs["tokens"].shape[1] ** 0.5)
            inputs["grid"] = (1, side, side)
        out = stage.model.stream(
            stream, {k: v.to(stage.device) if isinstance(v, Tensor) else v for k, v in inputs.items()}, [kind]
        )
        value = out.embedding if kind == "embedding" else out.token_embedding
        assert value is not None
        rows.append(value.cpu())
        if out.token_mask is not None:
            mask.append(out.token_mask.cpu())
        grid = out.grid
    return torch.cat(rows), torch.cat(mask) if mask else None, grid


def augment_of(stage: AlignStage, stream: str) -> str:
    """How the training sources of a stream present its pictures (cut-outs need a canvas when measured, too)."""
    found: list[SourceConfig] = [
        s for p in stage.config.phases.values() for s in p.sources.values() if stream in s.streams
    ]
    return "cutout" if any(s.augment_of("vision") == "cutout" for s in found) else "none"


@torch.no_grad()
def text_embeddings(stage: AlignStage, stream: str, texts: list[list[str]]) -> Tensor:
    """[N, P]: the mean tower feature of each item's texts through the head."""
    pooled = stage.frozen.texts(stage.model.tower(stream), [t for group in texts for t in group])
    means = torch.stack([part.mean(0) for part in pooled.split([len(g) for g in texts])])
    head = stage.model.heads[stage.model.owner(stream, "head")]
    return F.normalize(head(means.to(stage.device)).float(), dim=-1).cpu()


@register("measure", "retrieval")
def retrieval(stage: AlignStage, measure: MeasureConfig, records: list[dict[str, Any]]) -> list[Figure]:
    """Item -> name among the names of these records, and name -> item."""
    names = {}
    for r in records:
        names.setdefault(str(r.get("label") or texts_of(r)[0]), texts_of(r))
    gallery = list(names)
    query, _, _ = plain_embeddings(stage, measure, records, "embedding")
    text = text_embeddings(stage, measure.streams[1], [names[n] for n in gallery])
    truth = [gallery.index(str(r.get("label") or texts_of(r)[0])) for r in records]
    sim = query @ text.T
    positive = torch.zeros(len(gallery), len(records), dtype=torch.bool)
    positive[torch.tensor(truth), torch.arange(len(records))] = True
    clusters = [str(r.get("group") or gallery[t]) for r, t in zip(records, truth)]
    kind = "audio" if stage.model.tower(measure.streams[0]).modality == "audio" else "image"
    media = [r.get(kind) for r in records]
    if all(isinstance(m, str | Path) for m in media):
        seed = stage.config.train.seed
        stage.nearest.append(nearest_page(measure.name, sim, gallery, truth, list(map(str, media)), kind, seed))
    out = retrieval_figures(measure.name, sim, truth, clusters=clusters)
    return out + retrieval_figures(f"{measure.name}_from_text", sim.T, positive)


@register("measure", "zero_shot")
def zero_shot(stage: AlignStage, measure: MeasureConfig, records: list[dict[str, Any]]) -> list[Figure]:
    """Class of ``meta.FIELD`` among all classes of these records, asked by the measure's templates."""
    records = [r for r in records if class_of(r, measure.field)]
    classes = sorted({class_of(r, measure.field) for r in records})
    if len(classes) < 2:
        return [Figure(measure.name, None, note=f"fewer than two classes in meta.{measure.field}")]
    query, _, _ = plain_embeddings(stage, measure, records, "embedding")
    stream = measure.streams[1]
    text = embed_classes(lambda x: text_embeddings(stage, stream, [[t] for t in x]), classes, measure.templates)
    truth = [classes.index(class_of(r, measure.field)) for r in records]
    clusters = [str(r.get("group") or r.get("label")) for r in records]
    return [zero_shot_figure(measure.name, query @ text.T, truth, clusters=clusters)]


def class_of(record: dict[str, Any], field: str) -> str:
    """``meta.FIELD`` of a record, or its own field of that name; empty where it has neither."""
    value = (record.get("meta") or {}).get(field, record.get(field))
    return "" if value is None else str(value)


def stream_rows(
    stage: AlignStage,
    measure: MeasureConfig,
    stream: str,
    records: list[dict[str, Any]],
    scorer: Scorer | None = None,
) -> tuple[Any, list[int]]:
    """What a scorer compares of a stream (embeddings by default), and the record number of each row: a row for each
    text, none where a record has none."""
    field = FIELD[stage.model.tower(stream).modality]
    rows = [(i, t) for i, r in enumerate(records) for t in (texts_of(r) if field == "text" else [r.get(field)]) if t]
    held = [i for i, _ in rows]
    if not rows:
        return torch.empty(0, stage.model.embedding_dim), held
    if scorer is not None and "token_embedding" in scorer.needs:
        return token_rows(stage, measure, stream, [records[i] for i in held], [str(t) for _, t in rows], scorer), held
    if field == "text":
        return text_embeddings(stage, stream, [[t] for _, t in rows]), held
    return plain_embeddings(stage, measure, [records[i] for i in held], "embedding", stream)[0], held


@torch.no_grad()
def token_rows(
    stage: AlignStage,
    measure: MeasureConfig,
    stream: str,
    records: list[dict[str, Any]],
    texts: list[str],
    scorer: Scorer,
) -> Rows:
    """A scorer's rows made from the tokens of texts, or of the media of records."""
    if stage.model.tower(stream).modality != "text":
        tokens, mask, _ = plain_embeddings(stage, measure, records, "token_embedding", stream)
        return Rows(scorer.rows(Stream(token_embedding=tokens, token_mask=mask)))
    parts = []
    for i in range(0, len(texts), 256):
        inputs = {k: v.to(stage.device) for k, v in stage.model.inputs(stream, texts[i : i + 256]).items()}
        parts.append(stage.model.stream(stream, inputs, scorer.needs))
    longest = max(p.token_embedding.shape[1] for p in parts)
    tokens = torch.cat([F.pad(p.token_embedding.cpu(), (0, 0, 0, longest - p.token_embedding.shape[1])) for p in parts])
    mask = torch.cat([F.pad(p.token_mask.cpu(), (0, longest - p.token_mask.shape[1])) for p in parts])
    return Rows(scorer.rows(Stream(token_embedding=tokens, token_mask=mask)))


@register("measure", "pairs")
def pairs(stage: AlignStage, measure: MeasureConfig, records: list[dict[str, Any]]) -> list[Figure]:
    """Retrieval of the other half of each record, for every ordered pair of the measure's streams."""
    scorer = make("scorer", measure.scorer, f"measure '{measure.name}'")
    found = {s: stream_rows(stage, measure, s, records, scorer) for s in measure.streams}
    embeddings, keys = {s: rows for s, (rows, _) in found.items()}, {s: held for s, (_, held) in found.items()}
    if measure.by == "label":
        keys = {s: [str(records[i].get("label") or texts_of(records[i])[0]) for i in held] for s, held in keys.items()}
    return pair_figures(measure.name, embeddings, keys, scorer=scorer)


@register("measure", "geometry")
def geometry(stage: AlignStage, measure: MeasureConfig, records: list[dict[str, Any]]) -> list[Figure]:
    """How every two of the measure's streams lie to each other, over the records that have both (first texts)."""
    out: list[Figure] = []
    for a, b in combinations(measure.streams, 2):
        fields = [FIELD[stage.model.tower(s).modality] for s in (a, b)]
        both = [{**r, "text": texts_of(r)[:1]} for r in records if all(r.get(f) or f == "text" for f in fields)]
        x, y = (stream_rows(stage, measure, s, both)[0] for s in (a, b))
        if len(both) < 2 or len(x) != len(y):
            out.append(Figure(f"{measure.name}_{a}_{b}_gap", None, note="no records with both"))
        else:
            out += geometry_figures(measure.name, a, b, x, y)
    return out


@register("measure", "probe")
def probe(stage: AlignStage, measure: MeasureConfig, records: list[dict[str, Any]]) -> list[Figure]:
    """k-NN and linear probe of the first stream's embeddings for the classes of ``FIELD``."""
    assert measure.train is not None
    sides = []
    for part in (stage.records(measure.train, measure.recipes), records):
        labelled = [r for r in part if class_of(r, measure.field)]
        rows, held = stream_rows(stage, measure, measure.streams[0], labelled)
        sides.append((rows, [class_of(labelled[i], measure.field) for i in held]))
    return probe_figures(measure.name, sides[0], sides[1])


@register("measure", "regions")
def regions(stage: AlignStage, measure: MeasureConfig, records: list[dict[str, Any]]) -> list[Figure]:
    """Share of objects whose own word is the nearest one at the cell of their centre (at any token, without boxes).

    Of tokens on no grid one must have the object's word as its nearest; the shuffled control says what many tokens hit.
    """
    stream = measure.streams[0]
    held = stage.vocabularies.get(stream)
    if held is None:
        return [Figure(measure.name, None, note="no region_align objective was trained for this stream")]
    words, index = held["embedding"], held["index"]
    tokens, mask, grid = plain_embeddings(stage, measure, records, "token_embedding")
    centre = words.mean(0)
    best = F.normalize(tokens - centre, dim=-1) @ F.normalize(words - centre, dim=-1).T  # [N, M, V]
    swapped = best[derangement(len(best), stage.config.train.seed)]
    hits, control, clusters = [], [], []
    for i, record in enumerate(records):
        boxes = record.get("boxes")
        if boxes is None:
            name = str(record.get("label"))
            cells = [(slice(None), name)]
        elif grid is None:
            cells = [(None, b["text"]) for b in boxes]
        else:
            places = [(centre_cell(b["xyxy"], grid[1:]), b["text"]) for b in boxes]
            cells = [(slice(r * grid[2] + c, r * grid[2] + c + 1), t) for (r, c), t in places]
        for cell, name in cells:
            if name not in index:
                continue
            for source, target in ((best, hits), (swapped, control)):
                said = source[i].argmax(-1) if cell is None else source[i, cell].mean(0).argmax()
                target.append(float((said == index[name]).any()))
            clusters.append(str(record["id"]))
    if not hits:
        return [Figure(measure.name, None, note="no object of the vocabulary in these records")]
    value, low, high = mean_interval(hits, clusters)
    c, c_low, c_high = mean_interval(control, clusters)
    figure = Figure(measure.name, value, "higher", low, high, len(hits), "fraction", c, c_low, c_high, 1 / len(index))
    figure.note = f"{len(index)} words"
    return [figure]

