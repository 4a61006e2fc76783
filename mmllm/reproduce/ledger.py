"""Results of an experiment's stages under a hash of what they depend on: finished work is never done twice."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mmllm.train.disk import write_json

DONE, TIME = "done.json", "seconds.json"


def content_hash(content: Any) -> str:
    """16 hex digits of the sha256 of JSON-able content, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


class Ledger:
    """Folders of finished stages below ``root``: ``<root>/<name>-<hash>/``.

    A stage is finished when its folder holds ``done.json``, which is written last. Cut off before that, it is made
    again in the same folder, so that a stage that knows how to resume can go on from what it finds there. Another key
    is another folder; nothing is overwritten.
    """

    def __init__(self, root: str | Path):
        self.root = Path(root)

    def folder(self, name: str, key: Mapping[str, Any]) -> Path:
        """Where the stage with this key lies, finished or not."""
        return self.root / f"{name}-{content_hash(key)}"

    def finished(self, name: str, key: Mapping[str, Any]) -> bool:
        return (self.folder(name, key) / DONE).is_file()

    def stage(self, name: str, key: Mapping[str, Any], make: Callable[[Path], None]) -> Path:
        """The folder of a finished stage; calls ``make(folder)`` when it is not finished yet.

        Args:
            key: JSON-able; everything that the result depends on.
            make: fills the folder, which may hold what an interrupted call left there.
        """
        folder = self.folder(name, key)
        if (folder / DONE).is_file():
            return folder
        folder.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        try:
            make(folder)
        finally:  # the time of an attempt that failed or was interrupted counts, too
            write_json(folder / TIME, seconds(folder) + time.monotonic() - began)
        write_json(folder / DONE, {"name": name, "key": key, "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z")})
        return folder


def seconds(folder: Path) -> float:
    """Wall time that a stage has taken so far, all attempts together (those ended by a kill left out)."""
    file = folder / TIME
    return float(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else 0.0
