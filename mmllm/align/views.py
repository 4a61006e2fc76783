"""Decodes one item's media for the towers that run on every batch: each medium once, a view of it for each stream."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from mmllm.align.readers import Changed
from mmllm.align.reading import FIELD, medium_of, open_picture, resized_to, view_picture
from mmllm.data.media import load_audio
from mmllm.data.video import load_video
from mmllm.towers import resized

if TYPE_CHECKING:
    from mmllm.align.source import AlignSource


class MediaReader:
    """Decodes the live streams' media of one item, once per medium, and makes each stream's view of it."""

    def __init__(self, source: AlignSource):
        self.source = source

    def side(self, stream: str) -> int:
        """The side of a live stream's pictures."""
        source = self.source
        return source.image_size[stream] or getattr(self.processor(stream), "image_size", None) or 224

    def processor(self, stream: str) -> Any:
        reader = self.source.readers[stream]
        return (reader.reader if isinstance(reader, Changed) else reader).processor  # type: ignore[attr-defined]

    def read(self, number: int, seed: int | None) -> dict[str, Any]:
        """{stream: media changed by its transforms and augmentation, "boxes", "STREAM/boxes" of derived views}.

        Args:
            seed: None for plain views.
        """
        source = self.source
        record, how = source.records[number], source.config.augment_of("vision")
        live = [s for s, r in source.readers.items() if r.live and source.present[s][number]]
        out: dict[str, Any] = {"boxes": record.get("boxes")}
        opened: dict[str, Any] = {}
        for stream in live:
            kind = source.modality(stream)
            if kind not in opened:
                opened[kind] = self._open(kind, record, [s for s in live if source.modality(s) == kind])
        for k, stream in enumerate(live):
            kind, base = source.modality(stream), source.model.base(stream)
            # Views without transforms of their own are the base's view; each other one draws for itself.
            same = stream not in source.derived or not source.derived[stream].transforms
            if same and base != stream and base in out:
                out[stream], out[f"{stream}/boxes"] = out[base], out["boxes"]
                continue
            rng = None if seed is None else np.random.default_rng((seed, k))
            item = {FIELD[kind]: opened[kind], "boxes": record.get("boxes"), "meta": record.get("meta")}
            item = item if rng is None else source.chain(stream)(item, rng)
            medium = item[FIELD[kind]]
            if kind == "vision":
                medium = view_picture(medium, record, how, self.side(stream), rng if how != "none" else None)
                medium = resized(self.processor(stream), medium)
            out[stream] = medium
            if stream in source.derived:
                out[f"{stream}/boxes"] = item["boxes"]
            elif kind == "vision":
                out["boxes"] = item["boxes"]
        for stream in source.views:
            out.setdefault(f"{stream}/boxes", None)
        return out

    def _open(self, kind: str, record: dict[str, Any], streams: list[str]) -> Any:
        """A record's picture, wave or frames, at the size that these streams need."""
        source = self.source
        processor = self.processor(streams[0])
        if kind == "audio":
            return load_audio(medium_of(record, "audio"), processor.sampling_rate)
        sides = [resized_to(self.processor(s), self.side(s)) for s in streams]
        if kind == "video":
            return load_video(medium_of(record, "video"), source.config.frames, max(d or 0 for d in sides) or None)
        # A crop needs the pixels of the whole picture.
        whole = any("image" in source.chain(s).fields for s in streams) or None in sides
        return open_picture(record, source.config.augment_of("vision"), None if whole else max(d or 0 for d in sides))
