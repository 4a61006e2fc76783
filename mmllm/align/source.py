"""Turns a source's records into batches: features of frozen towers from the cache, inputs for towers that train."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

import mmllm.data.samplers  # noqa: F401  (registers the core samplers)
from mmllm.align.config import SamplerConfig, SourceConfig
from mmllm.align.frozen import FrozenFeatures, Progress, feature_dtype, fingerprint
from mmllm.align.live import LiveMedia
from mmllm.align.model import AlignModel
from mmllm.align.reading import FIELD, medium_of, open_picture, read_picture, resized_to, view_picture
from mmllm.blocks.augment import augment_log_mel
from mmllm.contracts import BatchSampler, Tower
from mmllm.data.captions import CaptionSampler, captions_of
from mmllm.data.check import TextLimit
from mmllm.data.media import load_audio
from mmllm.data.rejected import Rejected
from mmllm.data.transforms import build_transforms
from mmllm.errors import UserError, unknown
from mmllm.registry import get
from mmllm.towers import audio_inputs, image_inputs, set_image_size

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
        want: stream -> what objectives need of it (``embedding``, ``token_embedding``).
        training: streams whose tower trains, so that they get inputs instead of features.
        contrasts: whether an objective compares the items of a batch, which then needs two different ones.
        rejected: where items that cannot be read are written down.
        workers: threads that decode media of towers that train.
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
    ):
        if not records:
            raise UserError("no records", f"source '{name}'")
        self.name, self.config, self.records, self.model = name, config, records, model
        self.seed, self.number, self.contrasts, self.workers = seed, number, contrasts, workers
        self.rejected = Rejected() if rejected is None else rejected
        self.rejected.expect(name, len(records))
        self.batch_size = config.batch_size or default_batch_size
        self.labels = [str(r.get("label") or (texts_of(r) or [""])[0]) for r in records]
        self.sampler_config = SamplerConfig(type=config.sampler) if isinstance(config.sampler, str) else config.sampler
        self.keys = [key_of(r, self.sampler_config.by, label) for r, label in zip(records, self.labels)]
        if self.sampler_config.type == "distinct":
            self.batch_size = min(self.batch_size, len(set(self.keys)))
        self.transforms = build_transforms(config.transforms, f"source '{name}', transforms")
        self.captions = CaptionSampler(config.captions)
        self.media: dict[str, dict[str, Tensor]] = {}
        self.raw: dict[str, dict[str, Tensor]] = {}
        self.texts: dict[str, Tensor] = {}
        self.grids: dict[str, tuple[int, int, int] | None] = {}
        self.image_size: dict[str, int | None] = {}
        self.processors: dict[str, Any] = {}  # of live streams; a tower reads its own from disk at every call
        self._check_transforms(training)
        bad: dict[int, UserError] = {}
        for stream in config.streams:
            tower = model.tower(stream)
            needs = want.get(stream, {"embedding"})
            self.image_size[stream] = config.image_size or model.image_size.get(stream)
            if tower.modality == "text":
                self._read_texts(stream, tower, stream in training)
            elif stream not in training:
                fields = ["tokens"] if "token_embedding" in needs else []
                fields += ["pooled"] if "embedding" in needs else []
                self.media[stream] = frozen(
                    tower, records, fields, image_size=self.image_size[stream], augment=config.augment,
                    copies=config.copies, seed=seed, name=f"{name}-{stream}", progress=progress,
                    on_bad=bad.setdefault,
                )  # fmt: skip
                if tower.modality == "vision" and "tokens" in fields and getattr(tower, "grid", None) is not None:
                    side = round(self.media[stream]["tokens"].shape[2] ** 0.5)
                    self.grids[stream] = (1, side, side)
            elif tower.modality == "audio" and "audio" not in self.transforms.fields:
                self.raw[stream] = self._read_sounds(tower, progress, bad)
            else:
                self.processors[stream] = tower.preprocessor()
                if self.image_size[stream] and tower.modality == "vision":
                    set_image_size(self.processors[stream], int(self.image_size[stream] or 0))
        for item, error in bad.items():
            self._reject(item, error)
        self.usable = [i for i in range(len(records)) if i not in bad]
        if not self.usable:
            raise UserError("none of the items can be read", f"source '{name}'", "run mmllm data check on its file")
        self.live = LiveMedia(self._read_item, self.usable, self._reject, workers)
        self._samplers: dict[int, BatchSampler] = {}
        self.sampler(self.batch_size)  # its mistakes show before the first step

    def _check_transforms(self, training: set[str]) -> None:
        """Raises UserError for a transform of something that no training tower of this source reads, or of cut-outs."""
        if self.config.augment == "cutout" and "image" in self.transforms.fields:
            do = "choose augment: none, or leave the picture transforms out"
            raise UserError("augment: cutout and picture transforms exclude each other", f"source '{self.name}'", do)
        read = {FIELD[self.model.tower(s).modality] for s in self.config.streams if s in training}
        for transform in self.transforms.transforms:
            if transform.field and transform.field not in read:
                what = f"transform '{transform.name}' changes what no tower that trains here reads ({transform.field})"
                do = "let the tower train, or choose augment and copies: K for a frozen one"
                raise UserError(what, f"source '{self.name}'", do)

    def _reject(self, item: int, error: UserError) -> None:
        self.rejected.add(self.name, str(self.records[item]["id"]), error.where or self.name, error.what)
        self.rejected.check(self.name)

    def _read_texts(self, stream: str, tower: Tower, trains: bool) -> None:
        self.variants = [captions_of(r) or [(None, self.labels[i])] for i, r in enumerate(self.records)]
        unique = sorted({t for v in self.variants for _, t in v})
        self.text_index = {t: i for i, t in enumerate(unique)}
        if trains:
            return
        rows = []
        with torch.inference_mode():
            for i in range(0, len(unique), 256):
                rows.append(tower(**tower.encode(unique[i : i + 256])).pooled.float())  # type: ignore[attr-defined]
        self.texts[stream] = torch.cat(rows).clone()

    def _read_sounds(self, tower: Tower, progress: Progress | None, bad: dict[int, UserError]) -> dict[str, Tensor]:
        """Inputs of an audio tower that trains: [N, F, T] kept in half precision."""
        extractor = tower.preprocessor()
        rows: dict[str, list[Tensor]] = {}

        def wave(item: int) -> np.ndarray:
            try:
                return load_audio(medium_of(self.records[item], "audio"), extractor.sampling_rate)
            except UserError as e:
                bad[item] = e
                return np.zeros(extractor.sampling_rate, np.float32)

        with ThreadPoolExecutor(self.workers) as pool:
            for i in range(0, len(self.records), 64):
                inputs = audio_inputs(extractor, list(pool.map(wave, range(i, min(i + 64, len(self.records))))))
                inputs["input_features"] = inputs["input_features"].half()
                inputs["feature_attention_mask"] = inputs["feature_attention_mask"].bool()
                for name, value in inputs.items():
                    rows.setdefault(name, []).extend(value)
                if progress is not None:
                    progress(min(i + 64, len(self.records)), len(self.records))
        # Raw waveforms are as long as the longest of their 64; a fixed window leaves nothing to pad.
        return {k: torch.nn.utils.rnn.pad_sequence(v, batch_first=True) for k, v in rows.items()}

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

    def choose(self, step: int, rank: int, world: int) -> tuple[list[int], np.random.Generator]:
        """Item numbers of this process's part of a step's batch, and the generator for all further draws.

        Raises:
            UserError: objectives compare the batch's items, and there are fewer than two different ones.
        """
        chosen = [self.usable[i] for i in self.sampler(self.batch_size * world).indices(step)]
        if self.contrasts and len({self.records[i]["id"] for i in chosen}) < 2:
            what = f"the batch of step {step} has fewer than two distinct items, and nothing to contrast"
            raise UserError(what, f"source '{self.name}'", "raise the batch size, give more data or another sampler")
        return chosen[rank::world], np.random.default_rng((self.seed, self.number, step, rank))

    def batch(self, step: int, rank: int = 0, world: int = 1) -> dict[str, Any]:
        """``{"streams": {stream: inputs}, "ids", "labels", "languages", "boxes"}``, a pure function of its arguments.

        With ``captions: all`` an item has a row for each of its texts, all under its one id and label.
        """
        chosen, rng = self.choose(step, rank, world)
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        items: list[dict[str, Any]] = []
        if self.processors:
            spare = np.random.default_rng((self.seed, self.number, step, rank, 1))
            chosen, items = self.live.load(chosen, rng.integers(2**62, size=len(chosen)).tolist(), spare)
        passes = step * self.batch_size * world // len(self.usable)
        captions = None
        if self.config.captions == "all" and any(self.model.tower(s).modality == "text" for s in self.config.streams):
            captions, owner = self.captions.pick(self.variants, chosen, passes, rng)
            chosen, items = [chosen[o] for o in owner], [items[o] for o in owner] if items else []
        index = torch.tensor(chosen)
        streams: dict[str, dict[str, Any]] = {}
        languages = None
        for stream in self.config.streams:
            tower = self.model.tower(stream)
            if stream in self.media:
                copies = len(next(iter(self.media[stream].values())))
                which = torch.from_numpy(rng.integers(0, copies, len(chosen)))
                streams[stream] = {k: v[which, index] for k, v in self.media[stream].items()}
                if self.grids.get(stream):
                    streams[stream]["grid"] = self.grids[stream]
            elif stream in self.raw:
                inputs = {k: v[index] for k, v in self.raw[stream].items()}
                streams[stream] = self._heard(inputs, generator)
            elif tower.modality == "text":
                picked = captions or self.captions.pick(self.variants, chosen, passes, rng)[0]
                languages = [language for language, _ in picked]
                streams[stream] = self._text_batch(stream, [text for _, text in picked], rng, generator)
            elif tower.modality == "audio":
                inputs = dict(audio_inputs(self.processors[stream], [i[stream] for i in items]))
                streams[stream] = self._heard(inputs, generator)
            else:
                streams[stream] = dict(image_inputs(self.processors[stream], [i[stream] for i in items]))
        boxes = [i["boxes"] for i in items] if items else [self.records[i].get("boxes") for i in chosen]
        return {
            "streams": streams,
            "ids": [str(self.records[i]["id"]) for i in chosen],
            "labels": [self.labels[i] for i in chosen],
            "languages": languages if languages and any(languages) else None,
            "boxes": boxes if any(b is not None for b in boxes) else None,
        }

    def side(self, stream: str) -> int:
        """The side of a live stream's pictures."""
        return self.image_size[stream] or getattr(self.processors[stream], "image_size", None) or 224

    def _heard(self, inputs: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        x = inputs["input_features"].float()
        inputs["input_features"] = augment_log_mel(x, generator) if self.config.augment == "sound" else x
        return inputs

    def _text_batch(
        self, stream: str, picked: list[str], rng: np.random.Generator, generator: torch.Generator
    ) -> dict[str, Any]:
        if stream not in self.texts:
            if "text" in self.transforms.fields:
                picked = [self.transforms({"text": t}, rng)["text"] for t in picked]
            return self.model.tower(stream).encode(picked)  # type: ignore[attr-defined]
        pooled = self.texts[stream][[self.text_index[t] for t in picked]]
        if self.config.text_noise:
            noise = torch.randn(pooled.shape, generator=generator) / pooled.shape[1] ** 0.5
            pooled = pooled + self.config.text_noise * pooled.norm(dim=-1, keepdim=True) * noise
        return {"pooled": pooled}

    def _read_item(self, number: int, seed: int) -> dict[str, Any]:
        """The live streams' media of one item, changed by transforms and augmentation, and its boxes."""
        record, rng = self.records[number], np.random.default_rng(seed)
        modality = {s: self.model.tower(s).modality for s in self.processors}
        how = self.config.augment
        item: dict[str, Any] = {"boxes": record.get("boxes"), "meta": record.get("meta")}
        sides = {s: self.side(s) for s, m in modality.items() if m == "vision"}
        if sides:
            # A crop needs the pixels of the whole picture.
            drafts = [resized_to(self.processors[s], side) for s, side in sides.items()]
            whole = "image" in self.transforms.fields or None in drafts
            item["image"] = open_picture(record, how, None if whole else max(d or 0 for d in drafts))
        sounds = [s for s, m in modality.items() if m == "audio"]
        if sounds:
            item["audio"] = load_audio(medium_of(record, "audio"), self.processors[sounds[0]].sampling_rate)
        item = self.transforms(item, rng)
        out: dict[str, Any] = {"boxes": item["boxes"]}
        for stream, side in sides.items():
            out[stream] = view_picture(item["image"], record, how, side, rng if how != "none" else None)
        return out | {s: item["audio"] for s in sounds}
