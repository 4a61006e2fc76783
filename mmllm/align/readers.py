"""How one stream of a source gets its inputs: from cached features, from media decoded for the batch, or from texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmllm.align.model import media_inputs
from mmllm.blocks.augment import augment_log_mel
from mmllm.contracts import InputTransform, Tower
from mmllm.data.transforms import Chain


class Reader:
    """Makes a stream's inputs for rows of a batch.

    Attributes:
        live: True when the media of each row have to be decoded and handed over.
    """

    live = False

    def inputs(self, items: Sequence[int], given: Sequence[Any], rng: np.random.Generator | None) -> dict[str, Any]:
        """Inputs of the tower, or cached features, one row per entry.

        Args:
            items: item numbers of the rows.
            given: their decoded media (``live``) or their texts; empty for cached media.
            rng: None for the plain view, without any augmentation.
        """
        raise NotImplementedError


class CachedMedia(Reader):
    """Features of a frozen tower.

    Args:
        values: name -> [1 + copies, R, ...]; copy 0 is the plain view.
        row: [N] row of each item.
        about: what is the same for all rows (``grid``).
    """

    def __init__(self, values: dict[str, Tensor], row: Tensor, about: dict[str, Any]):
        self.values, self.row, self.about = values, row, about
        self.copies = len(next(iter(values.values())))

    def inputs(self, items: Sequence[int], given: Sequence[Any], rng: np.random.Generator | None) -> dict[str, Any]:
        which = np.zeros(len(items), int) if rng is None else rng.integers(0, self.copies, len(items))
        index = self.row[torch.tensor(items, dtype=torch.long)]
        return {k: v[torch.from_numpy(which), index] for k, v in self.values.items()} | self.about


class LiveMedia(Reader):
    """Media that are decoded for the batch; ``augment`` as in SourceConfig."""

    live = True

    def __init__(self, modality: str, processor: Any, augment: str):
        self.modality, self.processor, self.augment = modality, processor, augment

    def inputs(self, items: Sequence[int], given: Sequence[Any], rng: np.random.Generator | None) -> dict[str, Any]:
        made = media_inputs(self.modality, self.processor, given)
        return heard(made, rng) if self.augment == "sound" and self.modality == "audio" else made


class HeldSounds(Reader):
    """Inputs of an audio tower that trains, made once and kept in half precision; ``row`` as in CachedMedia."""

    def __init__(self, values: dict[str, Tensor], row: Tensor, augment: str):
        self.values, self.row, self.augment = values, row, augment

    def inputs(self, items: Sequence[int], given: Sequence[Any], rng: np.random.Generator | None) -> dict[str, Any]:
        index = self.row[torch.tensor(items, dtype=torch.long)]
        made: dict[str, Any] = {k: v[index] for k, v in self.values.items()}
        made["input_features"] = made["input_features"].float()
        return heard(made, rng) if self.augment == "sound" else made


class CachedTexts(Reader):
    """Pooled features [U, D] of the unique texts of a frozen tower, with random vectors added for training."""

    def __init__(self, table: Tensor, index: dict[str, int], noise: float):
        self.table, self.index, self.noise = table, index, noise

    def inputs(self, items: Sequence[int], given: Sequence[Any], rng: np.random.Generator | None) -> dict[str, Any]:
        pooled = self.table[[self.index[t] for t in given]]
        if self.noise and rng is not None:
            noise = torch.randn(pooled.shape, generator=torch_generator(rng)) / pooled.shape[1] ** 0.5
            pooled = pooled + self.noise * pooled.norm(dim=-1, keepdim=True) * noise
        return {"pooled": pooled}


class LiveTexts(Reader):
    """Texts that the tower reads anew each time."""

    def __init__(self, tower: Tower, transforms: Chain):
        self.tower, self.transforms = tower, transforms

    def inputs(self, items: Sequence[int], given: Sequence[Any], rng: np.random.Generator | None) -> dict[str, Any]:
        texts = list(given)
        if rng is not None and "text" in self.transforms.fields:
            texts = [self.transforms({"text": t}, rng)["text"] for t in texts]
        return self.tower.encode(texts)  # type: ignore[attr-defined]


class Changed(Reader):
    """Another reader's inputs after input transforms; their extras stand under ``extras``, outside the tower's view."""

    def __init__(self, reader: Reader, transforms: Sequence[InputTransform]):
        self.reader, self.transforms, self.live = reader, list(transforms), reader.live

    def inputs(self, items: Sequence[int], given: Sequence[Any], rng: np.random.Generator | None) -> dict[str, Any]:
        made = self.reader.inputs(items, given, rng)
        generator = torch_generator(rng or np.random.default_rng(0))
        extras: dict[str, Tensor] = {}
        for transform in self.transforms:
            made, new = transform(made, generator)
            extras |= new
        return {**made, "extras": extras}


def heard(inputs: dict[str, Any], rng: np.random.Generator | None) -> dict[str, Any]:
    """Log-mel inputs as an augmented view; as they are without a generator."""
    if rng is None:
        return inputs
    changed = augment_log_mel(inputs["input_features"].float(), torch_generator(rng))
    return {**inputs, "input_features": changed}


def torch_generator(rng: np.random.Generator) -> torch.Generator:
    """A torch generator that starts from a draw of numpy's."""
    return torch.Generator().manual_seed(int(rng.integers(2**62)))
