"""Features of frozen towers, computed once over a set of records and kept in the cache."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import cache
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmllm.align.model import pooled_texts
from mmllm.align.reading import medium_of, read_picture, resized_to
from mmllm.blocks.augment import augment_log_mel
from mmllm.contracts import Tower
from mmllm.data.blob import media_stamp
from mmllm.data.features import FeatureCache
from mmllm.data.media import load_audio
from mmllm.data.video import load_video
from mmllm.errors import UserError
from mmllm.towers import (
    MMLLMAudioFeatureExtractor,
    audio_inputs,
    image_inputs,
    resized,
    set_image_size,
    video_inputs,
)

Progress = Callable[[int, int], None]
CHUNK = 32  # items read, and written to the cache, together
CPU_PIXELS = 300_000  # of the pictures in one forward


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


@contextmanager
def single_threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """So many threads, in each of which torch computes alone.

    Small pictures keep one core busy each; two cores that share every layer of one batch wait for each other.
    """
    shared = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(shared)  # threads that start later take over what was set last


def joined(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Rows of several parts as one."""
    return {k: torch.cat([p[k] for p in parts]) for k in parts[0]}


class FrozenFeatures:
    """Runs a frozen tower over records, through the cache.

    Args:
        dtype: of the tower's computation and of what is kept.
        batch_size: items per forward; None as in ``FeatureConfig``.
        workers: threads that decode.
    """

    def __init__(
        self,
        cache: FeatureCache,
        dtype: torch.dtype,
        device: torch.device,
        batch_size: int | None = None,
        workers: int = 2,
    ):
        self.cache, self.dtype, self.device, self.batch_size = cache, dtype, device, batch_size
        self.workers = workers
        self._fingerprints: dict[int, str] = {}
        self._changing: list[Tower] = []
        self._trained: set[int] = set()

    @contextmanager
    def changing(self, towers: Sequence[Tower]) -> Iterator[None]:
        """Within, these towers train: their features are computed each time, and kept nowhere."""
        self._changing = list(towers)
        self._trained |= {id(t) for t in towers}
        try:
            yield
        finally:
            self._changing = []
            for tower in towers:
                self._fingerprints.pop(id(tower), None)

    def __call__(
        self,
        tower: Tower,
        records: Sequence[dict[str, Any]],
        fields: Sequence[str],
        *,
        image_size: int | None = None,
        augment: str = "none",
        copies: int = 0,
        frames: int = 8,
        seed: int = 0,
        name: str = "features",
        progress: Progress | None = None,
        on_bad: Callable[[int, UserError], object] | None = None,
    ) -> dict[str, Tensor]:
        """``fields`` of Features (``tokens``, ``pooled``) as [1 + copies, N, ...]; copy 0 is the plain view.

        Args:
            frames: of each video; one that has fewer is filled up with masked ones.
            on_bad: told of every item that cannot be read, whose features then mean nothing; None: such an item raises.
        """
        processor = tower.preprocessor()
        if image_size:
            set_image_size(processor, image_size)
        side = image_size or getattr(processor, "image_size", None) or 224
        media = [medium_of(r, tower.modality) for r in records]
        draft = resized_to(processor, side) if tower.modality in ("vision", "video") else None
        key = {
            # 2: large JPEGs are decoded small, unreadable items are marked; 3: sounds always keep their masks
            "version": 2 if tower.modality == "vision" else 3,
            "tower": self._fingerprint(tower),
            "items": hashlib.sha256("\n".join(media_stamp(m) for m in media).encode()).hexdigest(),
            "fields": sorted(fields),
            "augment": [augment, seed] if copies else [augment],
            "side": side,
            "dtype": str(self.dtype),
        } | ({"frames": frames} if tower.modality == "video" else {})
        runner = tower.frozen_copy().to(self.device, self.dtype)
        n = len(records)

        def one(index: int) -> Any:
            which, item = divmod(index, n)
            rng = np.random.default_rng((seed, which, item)) if which else None
            if tower.modality == "vision":
                return resized(processor, read_picture(records[item], augment, side, rng, draft))
            if tower.modality == "video":
                return load_video(media[item], frames, draft)
            return load_audio(media[item], processor.sampling_rate)

        def one_or_blank(index: int) -> tuple[Any, bool]:
            try:
                return one(index), True
            except UserError:
                if on_bad is None:
                    raise
                if tower.modality == "audio":
                    return np.zeros(processor.sampling_rate, np.float32), False
                blank = Image.new("RGB", (side, side))
                return blank if tower.modality == "vision" else [blank], False

        def features_of(rows: list[int], mapped: Callable[..., Any]) -> dict[str, Tensor]:
            items, readable = zip(*mapped(one_or_blank, rows))
            items = list(items)
            if tower.modality == "vision":
                inputs = image_inputs(processor, items)
            elif tower.modality == "video":
                inputs = video_inputs(processor, items, frames)
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
            out = joined(parts)
            out["readable"] = torch.tensor(readable)
            return out

        def compute(rows: list[int]) -> dict[str, Tensor]:
            if alone is None:
                out = features_of(rows, pool.map)
            else:
                pieces = [rows[at : at + size] for at in range(0, len(rows), size)]
                out = joined(list(alone.map(lambda piece: features_of(piece, map), pieces)))
            if "mask" in out and tower.modality == "vision" and bool(out["mask"].all()):
                del out["mask"]
            return out

        size = self.batch_size or self._forward_size(tower, side)
        threads = torch.get_num_threads() if tower.modality == "vision" and self.device.type == "cpu" else 1
        with ExitStack() as stack:
            pool = stack.enter_context(ThreadPoolExecutor(self.workers))  # decoding releases the GIL
            alone = stack.enter_context(single_threads(threads)) if threads > 1 else None
            passing = stack.enter_context(TemporaryDirectory())
            trains = any(tower is t for t in self._changing)
            kept = FeatureCache(passing) if trains else self.cache
            kept.chunk = size * max(threads, CHUNK // size)
            found = kept.get_or_compute(key, n, compute, copies + 1, name, progress)
            found = {k: v.clone() for k, v in found.items()} if trains else found
        found = found if copies else {k: v[None] for k, v in found.items()}
        for item in (~found.pop("readable").all(0)).nonzero().flatten().tolist():
            try:
                one(item)  # says what is wrong with it, in this run too
                error = UserError("could not be read when its features were computed", records[item].get("id"))
            except UserError as e:
                error = e
            if on_bad is None:
                raise error
            on_bad(item, error)
        return found

    def texts(self, tower: Tower, texts: Sequence[str], name: str = "texts") -> Tensor:
        """A text tower's pooled features [N, D] of texts, float32; of a tower that trains in this run, kept nowhere.

        A frozen tower computes them in ``dtype``, on a CPU a batch on each core.
        """
        if id(tower) in self._trained or not texts:
            return pooled_texts(tower, texts)
        said = hashlib.sha256("\0".join(texts).encode()).hexdigest()
        key = {"version": 2, "tower": self._fingerprint(tower), "texts": said, "dtype": str(self.dtype)}
        self.cache.chunk = 1024
        runner = cache(lambda: tower.frozen_copy().to(self.device, self.dtype))
        threads = torch.get_num_threads() if self.device.type == "cpu" else 1
        with ExitStack() as stack:
            mapped = stack.enter_context(single_threads(threads)).map if threads > 1 else map

            def compute(rows: list[int]) -> dict[str, Tensor]:
                return {"pooled": pooled_texts(runner(), [texts[i] for i in rows], mapped=mapped)}

            found = self.cache.get_or_compute(key, len(texts), compute, name=name)
        return found["pooled"].clone()

    def _fingerprint(self, tower: Tower) -> str:
        if id(tower) not in self._fingerprints:
            self._fingerprints[id(tower)] = fingerprint(tower)
        return self._fingerprints[id(tower)]

    def _forward_size(self, tower: Tower, side: int) -> int:
        """Pictures per forward: on a CPU as many as let its activations stay in the L2 cache."""
        if tower.modality != "vision" or self.device.type != "cpu":
            return CHUNK
        return max(4, min(CHUNK, CPU_PIXELS // side**2))
