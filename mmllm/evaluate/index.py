"""An index of embeddings: a folder with the vectors of a set of items, what the items are, and whose model made them.

``embeddings.safetensors`` (stream -> [N, D] float32) or ``embeddings.parquet`` (stream, id, path, text, embedding);
``items.jsonl``, one ``{"stream", "id", "path"?, "text"?}`` a row in the same order; and ``index.json``, written last.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmllm.contracts import Scorer
from mmllm.errors import UserError, unknown
from mmllm.evaluate.search import nearest

ABOUT, ITEMS, TENSORS, TABLE = "index.json", "items.jsonl", "embeddings.safetensors", "embeddings.parquet"
FORMATS = ("safetensors", "parquet")


@dataclass
class Hit:
    """One found item.

    Attributes:
        item: its row of ``items.jsonl``.
    """

    stream: str
    score: float
    item: dict[str, Any]


@dataclass
class Index:
    """Embeddings by stream, and the item of each row.

    Attributes:
        model: the align run that made them.
        vectors: stream -> [N, D].
        items: stream -> N items.
    """

    model: str
    vectors: dict[str, Tensor] = field(default_factory=dict)
    items: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def save(self, folder: str | Path, format: str = "safetensors", **about: Any) -> Path:
        """Writes the index, over an older one; ``about`` goes into ``index.json``.

        Raises:
            UserError: unknown format, a folder of something else, or parquet without its library.
        """
        folder = Path(folder)
        if format not in FORMATS:
            raise unknown("format", format, FORMATS)
        if folder.is_dir() and any(folder.iterdir()) and not (folder / ABOUT).is_file() or folder.is_file():
            raise UserError("this folder holds something else, not an index", folder, "give another --out")
        folder.mkdir(parents=True, exist_ok=True)
        for name in (ABOUT, TENSORS, TABLE):
            (folder / name).unlink(missing_ok=True)
        rows = [{"stream": s, **item} for s, items in self.items.items() for item in items]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / ITEMS).write_text(text, encoding="utf-8")
        if format == "safetensors":
            from safetensors.torch import save_file

            save_file({k: v.float().contiguous() for k, v in self.vectors.items()}, str(folder / TENSORS))
        else:
            pa, parquet = _arrow(folder)
            columns = {k: [row.get(k) for row in rows] for k in ("stream", "id", "path", "text")}
            vectors = [row for v in self.vectors.values() for row in v.float().numpy()]
            columns["embedding"] = pa.array(vectors, pa.list_(pa.float32()))
            parquet.write_table(pa.table(columns), folder / TABLE)
        data = {"model": self.model, "format": format, "rows": {k: len(v) for k, v in self.items.items()}, **about}
        (folder / ABOUT).write_text(json.dumps(data, indent=2, ensure_ascii=False), encoding="utf-8")
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> Index:
        """Reads an index.

        Raises:
            UserError: no index there, or parquet without its library.
        """
        folder = Path(folder)
        try:
            about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise UserError("no index here", folder, "make one with mmllm embed") from None
        index = cls(about["model"])
        for line in (folder / ITEMS).read_text(encoding="utf-8").splitlines():
            item = json.loads(line)
            index.items.setdefault(item.pop("stream"), []).append(item)
        if about["format"] == "safetensors":
            from safetensors.torch import load_file

            held = load_file(str(folder / TENSORS))
            index.vectors = {stream: held[stream] for stream in index.items}
        else:
            _, parquet = _arrow(folder)
            column = parquet.read_table(folder / TABLE, columns=["embedding"]).column("embedding").combine_chunks()
            flat = torch.from_numpy(column.flatten().to_numpy(zero_copy_only=False).copy()).view(len(column), -1)
            sizes = [len(v) for v in index.items.values()]
            index.vectors = dict(zip(index.items, flat.split(sizes), strict=True))
        return index

    def search(self, query: Tensor, stream: str, k: int = 5, scorer: Scorer | None = None) -> list[Hit]:
        """The k items of a stream nearest to a query [D], best first; equal ones in the index's order.

        Raises:
            UserError: no such stream.
        """
        if stream not in self.vectors:
            raise unknown("stream", stream, self.vectors, "index")
        gallery = self.vectors[stream]
        scores, places = nearest(query[None], gallery, min(k, len(gallery)), scorer)
        found = zip(scores[0].tolist(), places[0].tolist(), strict=True)
        return [Hit(stream, score, self.items[stream][place]) for score, place in found]


def _arrow(where: object) -> Sequence[Any]:
    """pyarrow and its parquet module.

    Raises:
        UserError: it is not installed.
    """
    import importlib

    try:
        return importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise UserError("parquet needs pyarrow", where, 'pip install "mmllm[data]", or take safetensors') from None
