"""Turns a source's records into batches: features of frozen towers from the cache, inputs for towers that train."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmllm.align.config import SourceConfig
from mmllm.align.model import AlignModel
from mmllm.blocks.augment import augment_log_mel, jitter_picture, place_cutout
from mmllm.contracts import Tower
from mmllm.data.features import FeatureCache
from mmllm.data.media import load_audio, load_image, open_image
from mmllm.errors import UserError
from mmllm.towers import MMLLMAudioFeatureExtractor, audio_inputs, image_inputs, set_image_size

Progress = Callable[[int, int], None]
CHUNK = 32  # items read, and written to the cache, together
CPU_PIXELS = 300_000  # of the pictures in one forward
FIELD = {"vision": "image", "audio": "audio", "text": "text"}


def texts_of(record: dict[str, Any]) -> list[str]:
    """The record's texts, the label where it has none."""
    text = record.get("text", record.get("label"))
    if isinstance(text, dict):
        text = list(text.values())
    return [text] if isinstance(text, str) else list(text or [])


def fingerprint(tower: Tower) -> str:
    """Hash of a tower's config and weights: features of other weights are other features.

    BatchNorm's count of training batches is left out: it changes no feature, and loading may change its number format.
    """
    digest = hashlib.sha256(repr(sorted(tower.to_config().items(), key=str)).encode())
    for name, value in sorted(tower.state_dict().items()):
        if name.endswith("num_batches_tracked"):
            continue
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def feature_dtype(choice: str, device: torch.device) -> torch.dtype:
    """The dtype for frozen towers: bfloat16 where the processor knows it, unless the choice says otherwise.

    The convolutional towers are bound by memory, not by matrix products: EfficientNet-Lite0 gains 1.1 to 1.9 times from
    bfloat16 even where matrix products lose by it, so this does not go by ``mmllm.blocks.compute.fast_dtype``.
    """
    if choice != "auto":
        return getattr(torch, choice)
    if device.type == "cpu":
        return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32


def _path(record: dict[str, Any], modality: str) -> str:
    value = record.get(FIELD[modality])
    if isinstance(value, list):
        value = value[0] if value else None
    if not isinstance(value, str):
        raise UserError(f"record has no {FIELD[modality]}", record.get("id"))
    return os.path.normpath(value)  # one file under two spellings has one set of features


def read_picture(record: dict[str, Any], how: str, side: int, rng: np.random.Generator | None) -> Any:
    """The record's picture as PIL RGB: a cut-out on a canvas, or the picture itself; ``rng`` None is the plain view."""
    path = _path(record, "vision")
    if how == "cutout":
        flip = not (record.get("meta") or {}).get("nomirror", False)
        return place_cutout(open_image(path), side, rng, flip)
    picture = load_image(path)
    return jitter_picture(picture, rng) if how == "scene" and rng is not None else picture


class FrozenFeatures:
    """Runs a frozen tower over records, through the cache.

    Args:
        dtype: of the tower's computation and of what is kept.
        batch_size: items per forward; None as in ``FeatureConfig``.
    """

    def __init__(self, cache: FeatureCache, dtype: torch.dtype, device: torch.device, batch_size: int | None = None):
        self.cache, self.dtype, self.device, self.batch_size = cache, dtype, device, batch_size
        self._fingerprints: dict[int, str] = {}

    def __call__(
        self,
        tower: Tower,
        records: Sequence[dict[str, Any]],
        fields: Sequence[str],
        *,
        image_size: int | None = None,
        augment: str = "none",
        copies: int = 0,
        seed: int = 0,
        name: str = "features",
        progress: Progress | None = None,
    ) -> dict[str, Tensor]:
        """``fields`` of Features (``tokens``, ``pooled``) as [1 + copies, N, ...]; copy 0 is the plain view."""
        if id(tower) not in self._fingerprints:
            self._fingerprints[id(tower)] = fingerprint(tower)
        processor = tower.preprocessor()
        if image_size:
            set_image_size(processor, image_size)
        side = image_size or getattr(processor, "image_size", None) or 224
        paths = [_path(r, tower.modality) for r in records]
        key = {
            "tower": self._fingerprints[id(tower)],
            "items": hashlib.sha256("\n".join(_stamp(p) for p in paths).encode()).hexdigest(),
            "fields": sorted(fields),
            "augment": [augment, seed] if copies else [augment],
            "side": side,
            "dtype": str(self.dtype),
        }
        runner = tower.frozen_copy().to(self.device, self.dtype)
        n = len(records)

        def one(index: int) -> Any:
            which, item = divmod(index, n)
            rng = np.random.default_rng((seed, which, item)) if which else None
            if tower.modality == "vision":
                return read_picture(records[item], augment, side, rng)
            return load_audio(paths[item], processor.sampling_rate)

        def compute(rows: list[int]) -> dict[str, Tensor]:
            items = list(pool.map(one, rows))
            if tower.modality == "vision":
                inputs = image_inputs(processor, items)
            else:
                inputs = audio_inputs(processor, items)
                if augment == "sound" and isinstance(processor, MMLLMAudioFeatureExtractor):
                    generator = torch.Generator().manual_seed(int(rows[0]) + seed)
                    changed = augment_log_mel(inputs["input_features"], generator)
                    random = torch.tensor([r >= n for r in rows])[:, None, None]
                    inputs["input_features"] = torch.where(random, changed, inputs["input_features"])
            parts = []
            with torch.inference_mode():
                for at in range(0, len(rows), size):
                    features = runner(**{k: v[at : at + size].to(self.device) for k, v in inputs.items()})
                    part = {f: getattr(features, f).to(self.dtype) for f in fields}
                    parts.append({**part, "mask": features.mask} if "tokens" in fields else part)
            out = {k: torch.cat([p[k] for p in parts]) for k in parts[0]}
            if "mask" in out and bool(out["mask"].all()):
                del out["mask"]
            return out

        size = self.batch_size or self._forward_size(tower, side)
        self.cache.chunk = max(size, CHUNK // size * size)
        with ThreadPoolExecutor(2) as pool:  # decoding releases the interpreter lock
            found = self.cache.get_or_compute(key, n, compute, copies + 1, name, progress)
        return found if copies else {k: v[None] for k, v in found.items()}


    def _forward_size(self, tower: Tower, side: int) -> int:
        """Pictures per forward: on a CPU as many as let its activations stay in the L2 cache."""
        if tower.modality != "vision" or self.device.type != "cpu":
            return CHUNK
        return max(4, min(CHUNK, CPU_PIXELS // side**2))


def _stamp(path: str) -> str:
    """Path with size and time, so that a changed file is another item."""
    try:
        info = os.stat(path)
    except OSError:
        raise UserError("no such file", path, "build the data again: mmllm data build") from None
    return f"{path} {info.st_size} {info.st_mtime_ns}"


class AlignSource:
    """Batches of one source, by step number.

    Args:
        want: stream -> what objectives need of it (``embedding``, ``token_embedding``).
        training: streams whose tower trains, so that they get inputs instead of features.
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
    ):
        if not records:
            raise UserError("no records", f"source '{name}'")
        self.name, self.config, self.records, self.model = name, config, records, model
        self.seed, self.number = seed, number
        self.batch_size = config.batch_size or default_batch_size
        self.labels = [str(r.get("label") or (texts_of(r) or [""])[0]) for r in records]
        self.by_label: dict[str, list[int]] = {}
        for i, label in enumerate(self.labels):
            self.by_label.setdefault(label, []).append(i)
        self.names = sorted(self.by_label)
        if config.sampler == "distinct":
            self.batch_size = min(self.batch_size, len(self.names))
        self.media: dict[str, dict[str, Tensor]] = {}
        self.raw: dict[str, dict[str, Tensor]] = {}
        self.texts: dict[str, Tensor] = {}
        self.grids: dict[str, tuple[int, int, int] | None] = {}
        self.image_size: dict[str, int | None] = {}
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
                )  # fmt: skip
                if tower.modality == "vision" and "tokens" in fields and getattr(tower, "grid", None) is not None:
                    side = round(self.media[stream]["tokens"].shape[2] ** 0.5)
                    self.grids[stream] = (1, side, side)
            elif tower.modality == "audio":
                self.raw[stream] = self._read_sounds(tower, progress)

    def _read_texts(self, stream: str, tower: Tower, trains: bool) -> None:
        self.variants = [texts_of(r) or [self.labels[i]] for i, r in enumerate(self.records)]
        unique = sorted({t for v in self.variants for t in v})
        self.text_index = {t: i for i, t in enumerate(unique)}
        if trains:
            return
        rows = []
        with torch.inference_mode():
            for i in range(0, len(unique), 256):
                rows.append(tower(**tower.encode(unique[i : i + 256])).pooled.float())  # type: ignore[attr-defined]
        self.texts[stream] = torch.cat(rows).clone()

    def _read_sounds(self, tower: Tower, progress: Progress | None) -> dict[str, Tensor]:
        """Inputs of an audio tower that trains: [N, F, T] kept in half precision."""
        extractor = tower.preprocessor()
        rows: dict[str, list[Tensor]] = {}
        for i in range(0, len(self.records), 64):
            waves = [load_audio(_path(r, "audio"), extractor.sampling_rate) for r in self.records[i : i + 64]]
            inputs = audio_inputs(extractor, waves)
            inputs["input_features"] = inputs["input_features"].half()
            inputs["feature_attention_mask"] = inputs["feature_attention_mask"].bool()
            for name, value in inputs.items():
                rows.setdefault(name, []).extend(value)
            if progress is not None:
                progress(min(i + 64, len(self.records)), len(self.records))
        # Raw waveforms are as long as the longest of their 64; a fixed window leaves nothing to pad.
        return {k: torch.nn.utils.rnn.pad_sequence(v, batch_first=True) for k, v in rows.items()}

    def choose(self, step: int, rank: int, world: int) -> tuple[list[int], np.random.Generator]:
        """Item numbers of this process's part of a step's batch, and the generator for all further draws."""
        rng = np.random.default_rng((self.seed, self.number, step))
        total = self.batch_size * world
        if self.config.sampler == "distinct":
            picked = rng.choice(len(self.names), min(total, len(self.names)), replace=False)
            items = [self.by_label[self.names[k]] for k in picked]
            chosen = [int(v[rng.integers(len(v))]) for v in items]
        else:
            chosen = rng.choice(len(self.records), total, replace=total > len(self.records)).tolist()
        return chosen[rank::world], np.random.default_rng((self.seed, self.number, step, rank))

    def batch(self, step: int, rank: int = 0, world: int = 1) -> dict[str, Any]:
        """``{"streams": {stream: inputs}, "ids", "labels", "boxes"}``, a pure function of its arguments."""
        chosen, rng = self.choose(step, rank, world)
        index = torch.tensor(chosen)
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        streams: dict[str, dict[str, Any]] = {}
        for stream in self.config.streams:
            if stream in self.media:
                copies = len(next(iter(self.media[stream].values())))
                which = torch.from_numpy(rng.integers(0, copies, len(chosen)))
                streams[stream] = {k: v[which, index] for k, v in self.media[stream].items()}
                if self.grids.get(stream):
                    streams[stream]["grid"] = self.grids[stream]
            elif stream in self.raw:
                inputs = {k: v[index] for k, v in self.raw[stream].items()}
                x = inputs["input_features"].float()
                inputs["input_features"] = augment_log_mel(x, generator) if self.config.augment == "sound" else x
                streams[stream] = inputs
            elif self.model.tower(stream).modality == "text":
                streams[stream] = self._text_batch(stream, chosen, rng, generator)
            else:
                streams[stream] = self._picture_batch(stream, chosen, rng)
        boxes = [self.records[i].get("boxes") for i in chosen]
        return {
            "streams": streams,
            "ids": [str(self.records[i]["id"]) for i in chosen],
            "labels": [self.labels[i] for i in chosen],
            "boxes": boxes if any(b is not None for b in boxes) else None,
        }

    def _text_batch(
        self, stream: str, chosen: list[int], rng: np.random.Generator, generator: torch.Generator
    ) -> dict[str, Any]:
        picked = [self.variants[i][rng.integers(len(self.variants[i]))] for i in chosen]
        if stream not in self.texts:
            return self.model.tower(stream).encode(picked)  # type: ignore[attr-defined]
        pooled = self.texts[stream][[self.text_index[t] for t in picked]]
        if self.config.text_noise:
            noise = torch.randn(pooled.shape, generator=generator) / pooled.shape[1] ** 0.5
            pooled = pooled + self.config.text_noise * pooled.norm(dim=-1, keepdim=True) * noise
        return {"pooled": pooled}

    def _picture_batch(self, stream: str, chosen: list[int], rng: np.random.Generator) -> dict[str, Any]:
        processor = self.model.tower(stream).preprocessor()
        side = self.image_size[stream] or getattr(processor, "image_size", 224)
        how = self.config.augment
        pictures = [read_picture(self.records[i], how, side, rng if how != "none" else None) for i in chosen]
        if self.image_size[stream]:
            set_image_size(processor, side)
        return dict(image_inputs(processor, pictures))
