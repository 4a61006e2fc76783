"""Turns a source's records into batches: features of frozen towers from the cache, inputs for towers that train."""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

import mmllm.data.samplers  # noqa: F401  (registers the core samplers)
from mmllm.align.config import SamplerConfig, SourceConfig, StreamConfig
from mmllm.align.frozen import FrozenFeatures, Progress, feature_dtype, fingerprint
from mmllm.align.live import LiveItems
from mmllm.align.model import AlignModel
from mmllm.align.readers import CachedMedia, CachedTexts, Changed, HeldSounds, LiveMedia, LiveTexts, Reader
from mmllm.align.reading import FIELD, medium_of, read_picture
from mmllm.align.views import MediaReader
from mmllm.contracts import BatchSampler, Tower
from mmllm.data.captions import CaptionSampler, captions_of
from mmllm.data.check import TextLimit
from mmllm.data.input_transforms import build_input_transforms
from mmllm.data.media import load_audio
from mmllm.data.rejected import Rejected
from mmllm.data.transforms import Chain, build_transforms
from mmllm.errors import UserError, unknown
from mmllm.registry import get
from mmllm.towers import audio_inputs, set_image_size

__all__ = ["AlignSource", "FrozenFeatures", "feature_dtype", "fingerprint", "read_picture", "source_needs", "texts_of"]


def texts_of(record: dict[str, Any]) -> list[str]:
    """The record's texts, the label where it has none."""
    return [text for _, text in captions_of(record)]


def text_limit(tower: Tower) -> TextLimit | None:
    """The longest text that a text tower takes; None for one that knows no limit."""
    longest: int | None = getattr(tower, "max_length", None)
    if longest is None:
        return None
    tokenizer = tower.preprocessor()
    return TextLimit(longest, lambda text: len(tokenizer(text, verbose=False)["input_ids"]))


def source_needs(config: SourceConfig, model: AlignModel, long_text: str = "skip") -> tuple[set[str], TextLimit | None]:
    """The fields that a source's records must have, and the tightest limit of its text streams (None with ``cut``)."""
    towers = [model.tower(s) for s in config.streams]
    texts = [t for t in towers if t.modality == "text" and long_text == "skip"]
    return {FIELD[t.modality] for t in towers}, tightest_limit(texts)


def tightest_limit(towers: Sequence[Tower]) -> TextLimit | None:
    """The smallest limit of several text towers; None where there is none."""
    limits = [text_limit(t) for t in towers]
    return min((x for x in limits if x is not None), key=lambda x: x.limit, default=None)


def key_of(record: dict[str, Any], by: str, label: str) -> Any:
    """What a sampler goes by: label, group, id or ``meta.FIELD`` of a record.

    Raises:
        UserError: the record does not have it, or there is no such key.
    """
    if by == "label":
        return label
    name = by.removeprefix("meta.")
    if by not in ("group", "id") and name == by:
        raise unknown("sampler key", by, ["label", "group", "id", "meta.FIELD"])
    value = (record.get("meta") or {}).get(name) if name != by else record.get(by)
    if value is None:
        raise UserError(f"record has no {by}, by which batches are made", record.get("id"))
    return value


class AlignSource:
    """Batches of one source, by step number.

    Args:
        want: stream -> what objectives need of it; its derived streams are those of ``derived`` that stand here.
        training: streams whose tower trains, so that they get inputs instead of features.
        contrasts: whether an objective compares the items of a batch, which then needs two different ones.
        rejected: where items that cannot be read are written down.
        workers: threads that decode media of towers that train.
        derived: configs of derived streams by name.
        uncached: streams whose frozen tower runs on every batch.
    """

    def __init__(
        self,
        name: str,
        config: SourceConfig,
        records: list[dict[str, Any]],
        model: AlignModel,
        want: dict[str, set[str]],
        training: set[str],
        frozen: FrozenFeatures,
        seed: int,
        number: int,
        default_batch_size: int,
        progress: Progress | None = None,
        contrasts: bool = False,
        rejected: Rejected | None = None,
        workers: int = 1,
        derived: dict[str, StreamConfig] | None = None,
        uncached: Collection[str] = (),
    ):
        if not records:
            raise UserError("no records", f"source '{name}'")
        self.name, self.config, self.records, self.model = name, config, records, model
        self.seed, self.number, self.contrasts, self.workers = seed, number, contrasts, workers
        self.want, self.frozen, self.progress = want, frozen, progress
        self.derived = {k: v for k, v in (derived or {}).items() if k in want}
        self.streams = [*config.streams, *(s for s in self.derived if s not in config.streams)]
        self.training = {s for s in self.streams if model.base(s) in training or s in uncached}
        self.rejected = Rejected() if rejected is None else rejected
        self.rejected.expect(name, len(records))
        self.batch_size = config.batch_size or default_batch_size
        self.labels = [str(r.get("label") or (texts_of(r) or [""])[0]) for r in records]
        self.label_ids = torch.tensor([stable_id(label) for label in self.labels])
        self.sampler_config = SamplerConfig(type=config.sampler) if isinstance(config.sampler, str) else config.sampler
        self.keys = [key_of(r, self.sampler_config.by, label) for r, label in zip(records, self.labels)]
        if self.sampler_config.type == "distinct":
            self.batch_size = min(self.batch_size, len(set(self.keys)))
        self.transforms = build_transforms(config.transforms, f"source '{name}', transforms")
        self.views = {
            s: build_transforms(c.transforms, f"stream '{s}', transforms") if c.transforms else self.transforms
            for s, c in self.derived.items()
        }
        self.image_size = {s: config.image_size or model.image_size.get(model.base(s)) for s in self.streams}
        choices = [config.captions, *(c.captions for c in self.derived.values())]
        # Whether any batch may lack rows or have several for an item: a property of the source, the same everywhere.
        self.ragged = bool(config.optional) or any(c == "all" or isinstance(c, int) for c in choices)
        self.media = MediaReader(self)
        self._check_transforms()
        self.variants = [captions_of(r) for r in records] if self._has_text() else []
        bad: dict[int, UserError] = {}
        self.present: dict[str, list[bool]] = {}
        self.readers: dict[str, Reader] = {}
        for stream in self.streams:
            self.present[stream] = self._present(stream)
            self.readers[stream] = self._reader(stream, bad)
        for item, error in bad.items():
            self._reject(item, error)
        self.usable = [i for i in range(len(records)) if i not in bad]
        if not self.usable:
            raise UserError("none of the items can be read", f"source '{name}'", "run mmllm data check on its file")
        self.live = LiveItems(self.media.read, self.usable, self._reject, workers)
        self._samplers: dict[int, BatchSampler] = {}
        self.sampler(self.batch_size)  # its mistakes show before the first step

    # ---- what is read, and how ----

    def modality(self, stream: str) -> str:
        """``vision``, ``audio``, ``text`` or ``video``."""
        return self.model.tower(stream).modality

    def chain(self, stream: str) -> Chain:
        """The transforms of a stream's media or texts."""
        return self.views.get(stream, self.transforms)

    def _has_text(self) -> bool:
        return any(self.modality(s) == "text" for s in self.streams)

    def _present(self, stream: str) -> list[bool]:
        """Which records have this stream's field; a label stands in for a text."""
        field = FIELD[self.modality(stream)]
        if field == "text":
            return [bool(v) for v in self.variants]
        return [bool(r.get(field)) for r in self.records]

    def _check_transforms(self) -> None:
        """Raises UserError for a transform of something that no live stream reads, or of cut-outs."""
        where = f"source '{self.name}'"
        for stream in self.streams:
            if self.config.augment_of("vision") == "cutout" and "image" in self.chain(stream).fields:
                do = "choose augment: none, or leave the picture transforms out"
                raise UserError("augment: cutout and picture transforms exclude each other", where, do)
        read = {FIELD[self.modality(s)] for s in self.training}
        own = [(s, t) for s, view in self.views.items() if view is not self.transforms for t in view.transforms]
        for stream, transform in [*((None, t) for t in self.transforms.transforms), *own]:
            fields = read if stream is None else {FIELD[self.modality(stream)]} if stream in self.training else set()
            if transform.field and transform.field not in fields:
                what = f"transform '{transform.name}' changes what no tower that trains here reads ({transform.field})"
                do = "let the tower train, or choose augment and copies: K for a frozen one, or cache: false"
                raise UserError(what, where if stream is None else f"{where}, stream '{stream}'", do)

    def _reader(self, stream: str, bad: dict[int, UserError]) -> Reader:
        config = self.derived.get(stream)
        reader = self._plain_reader(stream, bad)
        if config is None or not config.input_transforms:
            return reader
        changes = build_input_transforms(config.input_transforms, self.model.tower(stream), f"stream '{stream}'")
        if isinstance(reader, CachedMedia | CachedTexts):
            do = "let the tower train, or give the stream cache: false"
            raise UserError("input transforms need a tower that runs on every batch", f"stream '{stream}'", do)
        return Changed(reader, changes)

    def _plain_reader(self, stream: str, bad: dict[int, UserError]) -> Reader:
        tower, needs = self.model.tower(stream), self.want.get(stream, {"embedding"})
        beyond = needs - {"embedding", "token_embedding", "tokens", "pooled", "grid"}
        live = stream in self.training or any(n.startswith("layers[") for n in beyond)
        if tower.modality == "text":
            if live or needs - {"embedding", "pooled"}:
                return LiveTexts(tower, self.chain(stream))
            return self._cached_texts(stream, tower)
        twin = self.readers.get(self.model.base(stream))
        fields = ["tokens"] if needs & {"token_embedding", "tokens", "grid"} else []
        fields += ["pooled"] if needs & {"embedding", "pooled"} else []
        if not live:
            if isinstance(twin, CachedMedia) and set(fields) <= set(twin.values):
                return twin  # another draw of the same copies
            return self._cached_media(stream, tower, fields, bad)
        if tower.modality == "audio" and "audio" not in self.chain(stream).fields:
            return twin if isinstance(twin, HeldSounds) else self._held_sounds(stream, tower, bad)
        processor = tower.preprocessor()
        if (size := self.image_size[stream]) and tower.modality != "audio":
            set_image_size(processor, size)
        return LiveMedia(tower.modality, processor, self.config.augment_of(tower.modality))

    def _rows(self, stream: str) -> tuple[list[int], Tensor]:
        """Numbers of the items that have a stream, and the row of each item among them."""
        held = [i for i, here in enumerate(self.present[stream]) if here]
        row = torch.zeros(len(self.records), dtype=torch.long)
        row[held] = torch.arange(len(held))
        return held, row

    def _cached_media(self, stream: str, tower: Tower, fields: list[str], bad: dict[int, UserError]) -> CachedMedia:
        held, row = self._rows(stream)
        values = self.frozen(
            tower, [self.records[i] for i in held], fields, image_size=self.image_size[stream],
            augment=self.config.augment_of(tower.modality), copies=self.config.copies, frames=self.config.frames,
            seed=self.seed, name=f"{self.name}-{stream}", progress=self.progress,
            on_bad=lambda k, error: bad.setdefault(held[k], error),
        )  # fmt: skip
        about: dict[str, Any] = {}
        if tower.modality == "vision" and "tokens" in fields and getattr(tower, "grid", None) is not None:
            count = values["tokens"].shape[2]
            side = math.isqrt(count)  # class tokens that a tower keeps stand before the grid
            about |= {"grid": (1, side, side), "num_prefix": count - side * side}
        return CachedMedia(values, row, about)

    def _cached_texts(self, stream: str, tower: Tower) -> CachedTexts:
        unique = sorted({t for v in self.variants for _, t in v})
        with torch.inference_mode():
            rows = [
                tower(**tower.encode(unique[i : i + 256])).pooled.float()  # type: ignore[attr-defined]
                for i in range(0, len(unique), 256)
            ]
        return CachedTexts(torch.cat(rows).clone(), {t: i for i, t in enumerate(unique)}, self.config.text_noise)

    def _held_sounds(self, stream: str, tower: Tower, bad: dict[int, UserError]) -> HeldSounds:
        """Inputs of an audio tower that trains: [N, F, T] kept in half precision."""
        extractor = tower.preprocessor()
        held, row = self._rows(stream)
        rows: dict[str, list[Tensor]] = {}

        def wave(item: int) -> np.ndarray:
            try:
                return load_audio(medium_of(self.records[item], "audio"), extractor.sampling_rate)
            except UserError as e:
                bad[item] = e
                return np.zeros(extractor.sampling_rate, np.float32)

        with ThreadPoolExecutor(self.workers) as pool:
            for i in range(0, len(held), 64):
                inputs = audio_inputs(extractor, list(pool.map(wave, held[i : i + 64])))
                inputs["input_features"] = inputs["input_features"].half()
                inputs["feature_attention_mask"] = inputs["feature_attention_mask"].bool()
                for name, value in inputs.items():
                    rows.setdefault(name, []).extend(value)
                if self.progress is not None:
                    self.progress(min(i + 64, len(held)), len(held))
        # Raw waveforms are as long as the longest of their 64; a fixed window leaves nothing to pad.
        padded = {k: torch.nn.utils.rnn.pad_sequence(v, batch_first=True) for k, v in rows.items()}
        return HeldSounds(padded, row, self.config.augment_of("audio"))

    def _reject(self, item: int, error: UserError) -> None:
        self.rejected.add(self.name, str(self.records[item]["id"]), error.where or self.name, error.what)
        self.rejected.check(self.name)

    # ---- batches ----

    def sampler(self, total: int) -> BatchSampler:
        """The batch sampler over the usable items, for batches of ``total`` items.

        Raises:
            UserError: unknown sampler or option, or one that these items do not fit.
        """
        if total not in self._samplers:
            spec = self.sampler_config
            cls = get("batch_sampler", spec.type, f"source '{self.name}'")
            valid = [n for n in inspect.signature(cls).parameters if n not in ("keys", "batch_size", "seed")]
            for option in spec.options:
                if option not in valid:
                    raise unknown("option", option, valid, f"sampler '{spec.type}'")
            keys = [self.keys[i] for i in self.usable]
            self._samplers[total] = cls(keys, total, (self.seed, self.number), **spec.options)
        return self._samplers[total]

    def choose(self, step: int, rank: int, world: int) -> list[int]:
        """Item numbers of this process's part of a step's batch.

        Raises:
            UserError: objectives compare the batch's items, and there are fewer than two different ones; or the batch
                cannot be shared out evenly.
        """
        chosen = [self.usable[i] for i in self.sampler(self.batch_size * world).indices(step)]
        if self.contrasts and len({self.records[i]["id"] for i in chosen}) < 2:
            what = f"the batch of step {step} has fewer than two distinct items, and nothing to contrast"
            raise UserError(what, f"source '{self.name}'", "raise the batch size, give more data or another sampler")
        if len(chosen) % world:
            what = f"a batch of {len(chosen)} items cannot be shared evenly by {world} processes"
            raise UserError(what, f"source '{self.name}'", "choose a batch size that the data and the sampler can fill")
        return chosen[rank::world]

    def batch(self, step: int, rank: int = 0, world: int = 1) -> dict[str, Any]:
        """The inputs of a step as ``collate`` gives them, a pure function of its arguments."""
        chosen = self.choose(step, rank, world)
        passes = step * self.batch_size * world // len(self.usable)
        return self.collate(chosen, (self.seed, self.number, step, rank), passes)

    def collate(self, chosen: list[int], seed: tuple[int, ...] | None, passes: int = 0) -> dict[str, Any]:
        """Inputs of items: ``{"streams": {stream: inputs}, "owners", "ids", "labels", "label_ids", "items", ...}``.

        ``owners`` holds, for streams without exactly one row per item, the place in the batch that each row belongs to.

        Args:
            chosen: item numbers.
            seed: of all random draws; None: plain views, without augmentation.
            passes: how often the data have been gone through, for ``round_robin`` captions.
        """

        def rng(k: int) -> np.random.Generator | None:
            return None if seed is None else np.random.default_rng((*seed, k))

        draws = rng(0) or np.random.default_rng(0)
        loaded: list[dict[str, Any]] = []
        if any(r.live for r in self.readers.values()):
            seeds = None if seed is None else draws.integers(2**62, size=len(chosen)).tolist()
            chosen, loaded = self.live.load(chosen, seeds, rng(1) or np.random.default_rng(1))
        streams, owners, languages = {}, {}, None
        picks: dict[str, tuple[list[Any], list[int]]] = {}
        for k, stream in enumerate(self.streams):
            reader = self.readers[stream]
            if self.modality(stream) == "text":
                picked, owner = self._pick(stream, chosen, passes, rng(2), picks)
                languages = [language for language, _ in picked] if languages is None else languages
                given: list[Any] = [text for _, text in picked]
            else:
                owner = [p for p, item in enumerate(chosen) if self.present[stream][item]]
                given = [loaded[p][stream] for p in owner] if reader.live else []
            if self.ragged or owner != list(range(len(chosen))):  # processes must agree on who has owners
                owners[stream] = torch.tensor(owner, dtype=torch.long)
            streams[stream] = reader.inputs([chosen[p] for p in owner], given, rng(3 + k)) if owner else {}
        boxes = [i["boxes"] for i in loaded] if loaded else [self.records[i].get("boxes") for i in chosen]
        moved = {s: [loaded[p][f"{s}/boxes"] for p in range(len(chosen))] for s in self.views if self.readers[s].live}
        return {
            "streams": streams,
            "owners": owners,
            "ragged": self.ragged,
            "ids": [str(self.records[i]["id"]) for i in chosen],
            "labels": [self.labels[i] for i in chosen],
            "label_ids": self.label_ids[chosen],
            "groups": self._groups(chosen),
            "items": torch.tensor(chosen),
            "languages": languages if languages and any(languages) else None,
            "boxes": boxes if any(b is not None for b in boxes) else None,
            "view_boxes": {s: b for s, b in moved.items() if any(x is not None for x in b)},
            "meta": [self.records[i].get("meta") or {} for i in chosen],
        }

    def _groups(self, chosen: list[int]) -> list[str] | None:
        found = [self.records[i].get("group") for i in chosen]
        return [str(g) for g in found] if all(g is not None for g in found) else None

    def _pick(
        self,
        stream: str,
        chosen: list[int],
        passes: int,
        rng: np.random.Generator | None,
        picks: dict[str, tuple[list[Any], list[int]]],
    ) -> tuple[list[Any], list[int]]:
        """Captions of a text stream and their items' places; streams of one item see the same one unless they differ
        in their choice."""
        config = self.derived.get(stream)
        how = self.config.captions if config is None or config.captions is None else config.captions
        if str(how) not in picks:
            places = [p for p, item in enumerate(chosen) if self.variants[item]]
            sampler = CaptionSampler("first" if rng is None and how == "random" else how)
            picked, owner = sampler.pick(
                self.variants, [chosen[p] for p in places], passes, rng or np.random.default_rng(0)
            )
            picks[str(how)] = picked, [places[o] for o in owner]
        return picks[str(how)]


def stable_id(text: str) -> int:
    """63 bits that are the same for the same text in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
