"""The media of a tuning run: tower tokens from the feature cache where the tower is frozen, inputs where it trains."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmllm.align.frozen import FrozenFeatures, feature_dtype
from mmllm.data.anyres import views_of
from mmllm.data.blob import media_stamp
from mmllm.data.chat_batches import record_media
from mmllm.data.features import FeatureCache
from mmllm.errors import UserError
from mmllm.model.processor import data_uri
from mmllm.train.launch import is_main

FIELDS = {"image": "vision", "audio": "audio"}


class ChatMedia:
    """Makes model inputs from the media of a batch.

    Frozen towers run once over all media, before training; batches then read memory-mapped tokens.
    """

    def __init__(self, model: Any, processor: Any, records: Sequence[dict[str, Any]], config: Any):
        self.processor, self.copies, self.seed = processor, config.copies, config.train.seed
        self.tokens: dict[str, Tensor] = {}  # kind -> [1 + copies, n, N, D]
        self.masks: dict[str, Tensor] = {}
        self.index: dict[str, dict[str, int]] = {}
        self._lengths: dict[str, int] = {}
        self.grids: dict[str, tuple[int, int]] = {}  # of pictures, where they are cut
        wanted: dict[str, dict[str, Any]] = {"image": {}, "audio": {}}
        self._bad: dict[str, str] = {}  # key of a medium that could not be read -> why
        for record in records:
            for kind, source in record_media(record):
                wanted[kind].setdefault(medium_key(source), medium(source))
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        frozen = FrozenFeatures(FeatureCache(), feature_dtype("auto", device), device)
        for kind, sources in wanted.items():
            modality = FIELDS[kind]
            tower = getattr(model, f"{modality}_tower")
            if sources and tower is None:
                what = {"image": "pictures", "audio": "sounds"}[kind]
                raise UserError(
                    f"the data has {what}, the model has no {modality} tower",
                    do=f"give {modality}.tower, or leave these records out",
                )
            if sources and getattr(config.train, modality) == "none":
                self._run_tower(kind, tower, dict(sorted(sources.items())), frozen)
        self.audio_connector, self.audio_tower = model.audio_connector, model.audio_tower

    def _run_tower(self, kind: str, tower: Any, sources: dict[str, Any], frozen: FrozenFeatures) -> None:
        keys, first, items = [], {}, []  # of each item its medium; of each medium its first item
        for key, source in sources.items():
            first[key] = len(items)
            views = self._views(key, source) if kind == "image" else [source]
            keys += [key] * len(views)
            items += [{"id": key, kind: view} for view in views]
        began = time.monotonic()
        # The align run's scenes carry this name: the same files and tower are computed once for all stages.
        name = "scenes-image" if kind == "image" else "chat-audio"
        copies = self.copies if kind == "image" else 0
        found = frozen(
            tower, items, ["tokens"], augment="scene" if copies else "none", copies=copies, seed=self.seed, name=name,
            progress=_Progress(kind), on_bad=lambda row, error: self._bad.setdefault(keys[row], str(error)),
        )  # fmt: skip
        self.index[kind] = first
        self.tokens[kind] = found["tokens"]
        if "mask" in found:
            self.masks[kind] = found["mask"]
        if is_main() and time.monotonic() - began > 1:
            print(f"{kind}: features of {len(first):,} files ready after {time.monotonic() - began:.0f} s", flush=True)

    def _views(self, key: str, source: Any) -> Sequence[Any]:
        """What the tower sees of a picture: its tiles, where the model cuts it."""
        tiles = self.processor.tiles
        if tiles is None:
            return [source]
        try:
            self.grids[key] = self.processor.picture_grid(source)
        except UserError as e:
            self._bad[key], self.grids[key] = str(e), (1, 1)
        return views_of(source, tiles, self.grids[key])

    def problem(self, source: Any) -> str | None:
        """Why a medium could not be read when its features were made."""
        return self._bad.get(medium_key(source)) if self._bad else None

    def audio_tokens(self, source: Any) -> int:
        """LLM tokens of a sound; counted once."""
        if not self.processor.media_in_place:
            return 1
        key = medium_key(source)
        if key not in self._lengths:
            if "audio" in self.index:
                row = self.index["audio"][key]
                valid = (
                    int(self.masks["audio"][0, row].sum()) if "audio" in self.masks else self.tokens["audio"].shape[2]
                )
                self._lengths[key] = self.audio_connector.num_tokens(valid)
            else:
                self._lengths[key] = self.processor.media_inputs([], [self.processor.load_audio(source)])[1][0]
        return self._lengths[key]

    def inputs(self, media: list[tuple[str, Any]]) -> dict[str, Tensor]:
        """The media of a batch, in order, as keyword arguments of the model."""
        out: dict[str, Tensor] = {}
        for kind in ("image", "audio"):
            sources = [s for k, s in media if k == kind]
            if not sources:
                continue
            if kind not in self.index:
                load = self.processor.load_image if kind == "image" else self.processor.load_audio
                loaded = [load(s) for s in sources]
                out |= self.processor.media_inputs(*((loaded, []) if kind == "image" else ([], loaded)))[0]
                continue
            names = [medium_key(s) for s in sources]
            rows = torch.tensor([self.index[kind][name] for name in names])
            views = torch.ones_like(rows)
            if kind == "image" and (tiles := self.processor.tiles) is not None:
                grids = [self.grids[name] for name in names]
                views = torch.tensor([tiles.views(grid) for grid in grids])
                out["image_grids"] = torch.tensor(grids)
            out[f"{kind}_tower_tokens"] = self._pick(kind, rows, views)
            if kind in self.masks:
                out["audio_tower_mask"] = self.masks[kind][0][rows]
        return out

    def _pick(self, kind: str, first: Tensor, views: Tensor) -> Tensor:
        """Tokens [sum of views, N, D] of media whose first views are the items ``first``.

        With copies one of them for each medium, drawn from the items and nothing else random.
        """
        held = self.tokens[kind]
        before = views.cumsum(0) - views
        rows = (first - before).repeat_interleave(views) + torch.arange(int(views.sum()))
        if held.shape[0] == 1:
            return held[0][rows]
        rng = np.random.default_rng((self.seed, 2, *first.tolist()))
        copies = torch.from_numpy(rng.integers(held.shape[0], size=len(first)))
        return held[copies.repeat_interleave(views), rows]


def medium(source: Any) -> Any:
    """A medium as a decoder opens it: a path, a blob, or encoded bytes (those of a data URI among them)."""
    return data_uri(source) if isinstance(source, str) and source.startswith("data:") else source


def medium_key(source: Any) -> str:
    """One name for one medium: a path in one spelling, else what tells its bytes from others."""
    source = medium(source)
    return os.path.normpath(source) if isinstance(source, str) else media_stamp(source)


class _Progress:
    """Tells every ten seconds how far a long preparation is."""

    def __init__(self, kind: str):
        self.kind, self.last = kind, time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if is_main() and time.monotonic() - self.last > 10:
            self.last = time.monotonic()
            print(f"{self.kind}: features of {done:,} of {total:,} files", flush=True)
