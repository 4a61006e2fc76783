"""The feature cache: what a frozen tower says about each item is computed once, kept on disk and memory-mapped."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmllm.data.cache import OK, PART, cache_root, locked, require_space, sha256_tree

META, PROGRESS = "meta.json", "progress.json"
# numpy has no bfloat16: such tensors are kept as the same bits in int16.
NUMPY = {"float32": np.float32, "float16": np.float16, "bfloat16": np.int16, "int64": np.int64, "bool": np.bool_}


class FeatureCache:
    """Tensors per item under a key; a computation cut off half-way goes on where it stopped.

    A key names everything the values depend on (files, tower, sizes, augmentation seed); another key, another folder
    ``<root>/<name>-<hash>``. Values are raw little-endian files, opened as memory maps, so that a training process
    shares pages with its siblings and never holds the whole set.

    Args:
        root: default ``features`` in the cache.
        chunk: items computed per call; the unit that may be lost by a kill.
    """

    def __init__(self, root: str | Path | None = None, chunk: int = 64):
        self.root = Path(root) if root is not None else cache_root() / "features"
        self.chunk = chunk

    def path(self, key: Any, name: str = "features") -> Path:
        digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()
        return self.root / f"{name}-{digest[:16]}"

    def get_or_compute(
        self,
        key: Any,
        n: int,
        compute: Callable[[list[int]], dict[str, Tensor]],
        copies: int = 1,
        name: str = "features",
        progress: Callable[[int, int], None] | None = None,
    ) -> dict[str, Tensor]:
        """Memory-mapped tensors [n, ...], or [copies, n, ...] when ``copies`` is above 1.

        Args:
            key: JSON-able; what the values depend on beside ``n`` and ``copies``.
            compute: flat indices ``copy * n + item`` -> named tensors with one row per index. Called only for what is
                missing, always in the same chunks, so that the values do not depend on interruptions.
            progress: called with (items done, items in all).
        """
        path = self.path([key, n, copies], name)
        if not (path / OK).is_file():
            with locked(f"features-{path.name}"):
                if not (path / OK).is_file():
                    self._fill(path, n * copies, compute, {"key": key, "n": n, "copies": copies}, progress)
        meta = json.loads((path / META).read_text(encoding="utf-8"))
        lead = [copies, n] if copies > 1 else [n]
        return {k: _open(path, k, v, n * copies).view(*lead, *v["shape"]) for k, v in meta["tensors"].items()}

    def _fill(self, path: Path, total: int, compute: Any, meta: dict[str, Any], progress: Any) -> None:
        part = path.with_name(path.name + PART)
        part.mkdir(parents=True, exist_ok=True)
        done, tensors = 0, {}
        if (part / PROGRESS).is_file():
            state = json.loads((part / PROGRESS).read_text(encoding="utf-8"))
            done, tensors = state["done"], state["tensors"]
        while done < total:
            rows = list(range(done, min(done + self.chunk, total)))
            values = {k: v.detach().cpu().contiguous() for k, v in compute(rows).items()}
            if not tensors:
                tensors = {
                    k: {"dtype": str(v.dtype).split(".")[1], "shape": list(v.shape[1:])} for k, v in values.items()
                }
                require_space(sum(v[0].nbytes for v in values.values()) * total, self.root)
            for name, value in values.items():
                _write(part / f"{name}.bin", value, done)
            done = rows[-1] + 1
            # The count moves only after the data is on disk, so a kill can lose a chunk but never count a missing one.
            _write_json(part / PROGRESS, {"done": done, "tensors": tensors})
            if progress is not None:
                progress(done, total)
        _write_json(part / META, {**meta, "tensors": tensors})
        (part / PROGRESS).unlink(missing_ok=True)
        tree, size = sha256_tree(part)
        mark = {"name": path.name, "version": "1", "sha256": tree, "tree": tree, "bytes": size}
        _write_json(part / OK, {**mark, "made": time.strftime("%Y-%m-%d %H:%M:%S")})
        os.replace(part, path)


def _write_json(path: Path, data: Any) -> None:
    aside = path.with_name(path.name + ".new")
    aside.write_text(json.dumps(data, default=str), encoding="utf-8")
    os.replace(aside, path)


def _write(path: Path, value: Tensor, row: int) -> None:
    """Puts the rows of ``value`` at row number ``row`` of the raw file."""
    raw = value.view(torch.int16) if value.dtype == torch.bfloat16 else value
    data = raw.numpy().tobytes()
    with open(path, "r+b" if path.exists() else "w+b") as f:
        f.seek(row * (len(data) // len(value)))
        f.write(data)
        f.flush()
        os.fsync(f.fileno())


def _open(path: Path, name: str, spec: dict[str, Any], rows: int) -> Tensor:
    if rows == 0:
        return torch.empty(0, *spec["shape"], dtype=getattr(torch, spec["dtype"]))
    # Copy-on-write: the mapped tensor looks writable to torch, and a stray write never reaches the file.
    array = np.memmap(path / f"{name}.bin", NUMPY[spec["dtype"]], mode="c", shape=(rows, *spec["shape"]))
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if spec["dtype"] == "bfloat16" else tensor
