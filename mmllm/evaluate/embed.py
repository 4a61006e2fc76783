"""Embeds the items of a folder or records file with an aligned model, and queries against what was embedded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmllm.align.folder import final_align, load_align
from mmllm.align.model import AlignModel
from mmllm.align.reading import FIELD, resized_to
from mmllm.data.blob import Blob
from mmllm.data.captions import captions_of
from mmllm.data.media import load_audio, load_image
from mmllm.data.open import DataSpec, located_records
from mmllm.data.records import Located
from mmllm.data.rejected import Rejected
from mmllm.data.video import load_video
from mmllm.errors import UserError, unknown
from mmllm.evaluate.index import Hit, Index


class Embedder:
    """An align run that turns pictures, sounds and texts into unit vectors.

    Args:
        run: run folder of a finished align run.
        device: None takes an accelerator where there is one.
        workers: threads that decode.
    """

    def __init__(self, run: str | Path, device: str | None = None, workers: int = 2):
        self.run = Path(run)
        self.model: AlignModel = load_align(run)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model.to(self.device)
        self.workers = workers
        self._processors: dict[str, Any] = {}

    def streams(self, names: Sequence[str] | None = None) -> dict[str, str]:
        """Stream -> record field of every stream with a head, or of the named ones.

        Raises:
            UserError: a stream that the model does not have, or one without a head.
        """
        known = {n: FIELD[t.modality] for n in self.model.heads if (t := self.model.tower(n)).modality in FIELD}
        for name in names or ():
            if name not in known:
                raise unknown("stream", name, known, self.run)
        return {n: f for n, f in known.items() if names is None or n in names}

    def load(self, stream: str, value: Any) -> Any:
        """A medium decoded for a stream, a text as it is.

        Raises:
            UserError: it cannot be read.
        """
        tower = self.model.tower(stream)
        if tower.modality == "text":
            return value
        if stream not in self._processors:
            self._processors[stream] = tower.preprocessor()
        processor = self._processors[stream]
        if tower.modality == "audio":
            return load_audio(value, processor.sampling_rate)
        side = self.model.image_size.get(stream) or getattr(processor, "image_size", None) or 224
        small = resized_to(processor, side)
        return load_video(value, side=small) if tower.modality == "video" else load_image(value, small)

    @torch.inference_mode()
    def embed(self, stream: str, items: Sequence[Any]) -> Tensor:
        """[N, D] unit vectors of loaded items."""
        inputs = {k: v.to(self.device) for k, v in self.model.inputs(stream, items).items()}
        out = self.model.stream(stream, inputs).embedding
        assert out is not None
        return out.float().cpu()

    def partners(self, stream: str) -> list[str]:
        """The streams that a stream was aligned with."""
        pairs = [pair.split(":") for pair in self.model.logit_scale]
        return [other for pair in pairs if stream in pair for other in pair if other != stream]

    def query_stream(self, modality_field: str, gallery: str) -> str:
        """The stream that reads a query of a field (``text``, ``image``, ``audio``) aimed at a gallery's stream.

        The stream that was aligned with the gallery's comes first, then the gallery's own, then any.

        Raises:
            UserError: the model reads no such queries.
        """
        known = self.streams()
        for name in [*self.partners(gallery), gallery, *known]:
            if known.get(name) == modality_field:
                return name
        raise UserError(
            f"this model takes no {modality_field}", self.run, f"it takes: {', '.join(set(known.values()))}"
        )


def embed_data(
    embedder: Embedder,
    data: str | Path | DataSpec,
    streams: Sequence[str] | None = None,
    columns: dict[str, Any] | None = None,
    batch_size: int = 64,
    limit: int | None = None,
    rejected: Rejected | None = None,
) -> Index:
    """The embeddings of every record's media and texts, each list item and each text a row of its own.

    What cannot be read is left out and put down in ``rejected``.

    Args:
        data: a folder of media, or anything else that ``open_records`` reads.
        streams: which of the model's streams; None takes all that the records feed.

    Raises:
        UserError: unknown stream, or nothing to embed.
    """
    rejected = Rejected() if rejected is None else rejected
    wanted = embedder.streams(streams)
    index = Index(str(final_align(embedder.run).absolute()))
    rows: dict[str, list[Tensor]] = {}
    found = islice(located_records(data, columns), limit)
    with ThreadPoolExecutor(embedder.workers) as pool:
        while batch := list(islice(found, batch_size)):
            for item in batch:
                if item.record is None:
                    rejected.add("", item.where, item.where, str(item.problem))
            for stream, field in wanted.items():
                values = [pair for item in batch if item.record is not None for pair in _values(item, field)]
                for start in range(0, len(values), batch_size):
                    good = _readable(embedder, stream, values[start : start + batch_size], pool, rejected)
                    if good:
                        rows.setdefault(stream, []).append(embedder.embed(stream, [item for _, item in good]))
                        index.items.setdefault(stream, []).extend(about for about, _ in good)
    if not rows:
        what = f"nothing to embed: no record has {' or '.join(sorted(set(wanted.values())))} that can be read"
        raise UserError(what, data.path if isinstance(data, DataSpec) else data)
    index.vectors = {stream: torch.cat(parts) for stream, parts in rows.items()}
    return index


def _values(item: Located, field: str) -> Iterator[tuple[dict[str, Any], Any]]:
    """(row of items.jsonl, medium or text) of everything that a record holds of a field."""
    assert item.record is not None
    about = {"id": str(item.record["id"])}
    if field == "text":
        for language, text in captions_of(item.record) if "text" in item.record else []:
            if isinstance(text, str) and text.strip():
                yield about | {"text": text} | ({"language": language} if language else {}), text
        return
    held = item.record.get(field)
    for value in held if isinstance(held, list) else [held]:
        if value is not None:
            path = value.name if isinstance(value, Blob) else value if isinstance(value, str) else item.where
            yield about | {"path": path}, value


def _readable(
    embedder: Embedder, stream: str, values: Sequence[tuple[dict[str, Any], Any]], pool: Any, rejected: Rejected
) -> list[tuple[dict[str, Any], Any]]:
    """(row, loaded item) of what can be read; the rest goes to ``rejected``."""

    def load(value: Any) -> Any:
        try:
            return embedder.load(stream, value)
        except UserError as e:
            return e

    good = []
    for (about, _), item in zip(values, pool.map(load, [v for _, v in values]), strict=True):
        if isinstance(item, UserError):
            rejected.add("", str(about.get("path")), item.where or about["id"], item.what)
        else:
            good.append((about, item))
    return good


def search_data(
    embedder: Embedder, index: Index, field: str, query: Any, k: int = 5, streams: Sequence[str] = ()
) -> list[Hit]:
    """The k nearest items of each searched stream, best first.

    Args:
        field: what the query is: ``text``, ``image`` or ``audio``.
        query: the text, or what ``load_image`` or ``load_audio`` opens.
        streams: of the index; none: those aligned with a stream that reads the query, or else all.

    Raises:
        UserError: unknown stream, or a query that this model or a decoder cannot read.
    """
    known = embedder.streams()
    aligned = [s for s in index.vectors if any(known.get(p) == field for p in embedder.partners(s))]
    hits = []
    for gallery in streams or aligned or list(index.vectors):
        stream = embedder.query_stream(field, gallery)
        vector = embedder.embed(stream, [embedder.load(stream, query)])[0]
        hits += index.search(vector, gallery, k)
    return hits
