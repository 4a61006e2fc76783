"""Chooses how each stream of a source is read, and makes ready what is read once: features, texts, log-mel inputs."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mmllm.align.readers import CachedMedia, CachedTexts, Changed, HeldSounds, LiveMedia, LiveTexts, Reader
from mmllm.align.reading import FIELD, medium_of
from mmllm.contracts import Tower
from mmllm.data.input_transforms import build_input_transforms
from mmllm.data.media import load_audio
from mmllm.errors import UserError
from mmllm.towers import audio_inputs, set_image_size

if TYPE_CHECKING:
    from mmllm.align.source import AlignSource


class ReaderMaker:
    """Makes the readers of a source's streams.

    Attributes:
        bad: item number -> why it cannot be read, for those found so far.
    """

    def __init__(self, source: AlignSource):
        self.source = source
        self.bad: dict[int, UserError] = {}

    def check_transforms(self) -> None:
        """Raises UserError for a transform of something that no live stream reads, or of cut-outs."""
        source = self.source
        where = f"source '{source.name}'"
        for stream in source.streams:
            if source.config.augment_of("vision") == "cutout" and "image" in source.chain(stream).fields:
                do = "choose augment: none, or leave the picture transforms out"
                raise UserError("augment: cutout and picture transforms exclude each other", where, do)
        read = {FIELD[source.modality(s)] for s in source.training}
        uses = [(where, t, read) for t in source.transforms.transforms]
        for stream, view in source.views.items():
            own = {FIELD[source.modality(stream)]} if stream in source.training else set()
            if view is not source.transforms:
                uses += [(f"{where}, stream '{stream}'", t, own) for t in view.transforms]
        for place, transform, fields in uses:
            if transform.field and transform.field not in fields:
                what = f"transform '{transform.name}' changes what no tower that trains here reads ({transform.field})"
                do = "let the tower train, or choose augment and copies: K for a frozen one, or cache: false"
                raise UserError(what, place, do)

    def make(self, stream: str) -> Reader:
        """The reader of a stream; those made before it may be shared."""
        config = self.source.derived.get(stream)
        reader = self._plain(stream)
        if config is None or not config.input_transforms:
            return reader
        changes = build_input_transforms(config.input_transforms, self.source.model.tower(stream), f"stream '{stream}'")
        if isinstance(reader, CachedMedia | CachedTexts):
            do = "let the tower train, or give the stream cache: false"
            raise UserError("input transforms need a tower that runs on every batch", f"stream '{stream}'", do)
        return Changed(reader, changes)

    def _plain(self, stream: str) -> Reader:
        tower, needs = self.source.model.tower(stream), self.source.want.get(stream, {"embedding"})
        beyond = needs - {"embedding", "token_embedding", "tokens", "pooled", "grid"}
        live = stream in self.source.training or any(n.startswith("layers[") for n in beyond)
        twin = self.source.readers.get(self.source.model.base(stream))
        if tower.modality == "text":
            if live or needs - {"embedding", "pooled"}:
                return LiveTexts(tower, self.source.chain(stream))
            return twin if isinstance(twin, CachedTexts) else self._cached_texts(tower)
        fields = ["tokens"] if needs & {"token_embedding", "tokens", "grid"} else []
        fields += ["pooled"] if needs & {"embedding", "pooled"} else []
        if not live:
            if isinstance(twin, CachedMedia) and set(fields) <= set(twin.values):
                return twin  # another draw of the same copies
            return self._cached_media(stream, tower, fields)
        if tower.modality == "audio" and "audio" not in self.source.chain(stream).fields:
            return twin if isinstance(twin, HeldSounds) else self._held_sounds(stream, tower)
        processor = tower.preprocessor()
        if (size := self.source.image_size[stream]) and tower.modality != "audio":
            set_image_size(processor, size)
        return LiveMedia(tower.modality, processor, self.source.config.augment_of(tower.modality))

    def _rows(self, stream: str) -> tuple[list[int], Tensor]:
        """Numbers of the items that have a stream, and the row of each item among them."""
        held = [i for i, here in enumerate(self.source.present[stream]) if here]
        row = torch.zeros(len(self.source.records), dtype=torch.long)
        row[held] = torch.arange(len(held))
        return held, row

    def _cached_media(self, stream: str, tower: Tower, fields: list[str]) -> CachedMedia:
        source, config = self.source, self.source.config
        held, row = self._rows(stream)
        values = source.frozen(
            tower, [source.records[i] for i in held], fields, image_size=source.image_size[stream],
            augment=config.augment_of(tower.modality), copies=config.copies, frames=config.frames, seed=source.seed,
            name=f"{source.name}-{stream}", progress=source.progress,
            on_bad=lambda k, error: self.bad.setdefault(held[k], error),
        )  # fmt: skip
        about: dict[str, Any] = {}
        if tower.modality == "vision" and "tokens" in fields and getattr(tower, "grid", None) is not None:
            count = values["tokens"].shape[2]
            side = math.isqrt(count)  # class tokens that a tower keeps stand before the grid
            about |= {"grid": (1, side, side), "num_prefix": count - side * side}
        return CachedMedia(values, row, about)

    def _cached_texts(self, tower: Tower) -> CachedTexts:
        unique = sorted({t for v in self.source.variants for _, t in v})
        table = self.source.frozen.texts(tower, unique, f"{self.source.name}-texts")
        return CachedTexts(table, {t: i for i, t in enumerate(unique)}, self.source.config.text_noise)

    def _held_sounds(self, stream: str, tower: Tower) -> HeldSounds:
        """Inputs of an audio tower that trains: [N, F, T] kept in half precision."""
        extractor = tower.preprocessor()
        held, row = self._rows(stream)
        rows: dict[str, list[Tensor]] = {}

        def wave(item: int) -> np.ndarray:
            try:
                return load_audio(medium_of(self.source.records[item], "audio"), extractor.sampling_rate)
            except UserError as e:
                self.bad[item] = e
                return np.zeros(extractor.sampling_rate, np.float32)

        with ThreadPoolExecutor(self.source.workers) as pool:
            for i in range(0, len(held), 64):
                inputs = audio_inputs(extractor, list(pool.map(wave, held[i : i + 64])))
                inputs["input_features"] = inputs["input_features"].half()
                inputs["feature_attention_mask"] = inputs["feature_attention_mask"].bool()
                for name, value in inputs.items():
                    rows.setdefault(name, []).extend(value)
                if self.source.progress is not None:
                    self.source.progress(min(i + 64, len(held)), len(held))
        # Raw waveforms are as long as the longest of their 64; a fixed window leaves nothing to pad.
        padded = {k: torch.nn.utils.rnn.pad_sequence(v, batch_first=True) for k, v in rows.items()}
        return HeldSounds(padded, row, self.source.config.augment_of("audio"))
