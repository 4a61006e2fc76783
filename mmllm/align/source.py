"""Turns a source's records into batches: features of frozen towers from the cache, inputs for towers that train."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from typing import Any

import numpy as np
import torch

import mmllm.data.samplers  # noqa: F401  (registers the core samplers)
from mmllm.align.config import SamplerConfig, SourceConfig, StreamConfig
from mmllm.align.frozen import FrozenFeatures, Progress
from mmllm.align.live import LiveItems
from mmllm.align.make_readers import ReaderMaker
from mmllm.align.model import AlignModel
from mmllm.align.readers import Reader
from mmllm.align.reading import FIELD
from mmllm.align.record_keys import key_of, stable_id, texts_of
from mmllm.align.views import MediaReader
from mmllm.contracts import BatchSampler
from mmllm.data.captions import CaptionSampler, captions_of
from mmllm.data.rejected import Rejected
from mmllm.data.transforms import Chain, build_transforms
from mmllm.errors import UserError, unknown
from mmllm.registry import get


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
        maker = ReaderMaker(self)
        maker.check_transforms()
        self.variants = [captions_of(r) for r in records] if self._has_text() else []
        self.present: dict[str, list[bool]] = {}
        self.readers: dict[str, Reader] = {}
        for stream in self.streams:
            self.present[stream] = self._present(stream)
            self.readers[stream] = maker.make(stream)
        for item, error in maker.bad.items():
            self._reject(item, error)
        self.usable = [i for i in range(len(records)) if i not in maker.bad]
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
