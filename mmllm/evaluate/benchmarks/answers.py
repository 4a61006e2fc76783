"""The folder of one evaluated model: who answers it, and every raw answer as soon as it is there, to go on from."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmllm.errors import UserError

IDENTITY, ANSWERS = "asked.json", "answers.jsonl"
EDGE = 2**16  # bytes at each end of a weights file that stand for the whole
# (task, split, id, control): control is "" for the question itself, "shuffled" or "blind".
Key = tuple[str, str, str, str]


@dataclass
class Given:
    """A raw answer.

    Attributes:
        answer: the text; None for a choice by scores alone.
        scores: log-probabilities of the sample's choices.
    """

    answer: str | None
    scores: list[float] | None = None


def weights_id(path: str | Path) -> str | None:
    """Short hash of a model's weights: names, sizes and both ends of its safetensors files; None without any."""
    folder, digest = Path(path), hashlib.sha256()
    folder = folder / "final" if (folder / "final").is_dir() else folder
    files = sorted(p for depth in ("*", "*/*") for p in folder.glob(f"{depth}.safetensors"))
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.relative_to(folder).as_posix()} {size}\n".encode())
        with file.open("rb") as f:
            digest.update(f.read(EDGE))
            f.seek(max(size - EDGE, 0))
            digest.update(f.read(EDGE))
    return digest.hexdigest()[:16] if files else None


class AnswerStore:
    """Raw answers of one model, decoded one way, each task in one style.

    Args:
        folder: made when it is not there.
        identity: ``model``, ``weights``, ``decode``, ``seed``; ``styles`` (task -> style) may grow from run to run.

    Raises:
        UserError: the folder holds something else; nothing in it is changed.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]):
        self.folder = folder
        self.path = folder / ANSWERS
        self.held: dict[Key, tuple[Given, str]] = {}
        known = self._identity(identity)
        folder.mkdir(parents=True, exist_ok=True)
        styles = {**known.get("styles", {}), **identity["styles"]}
        part = folder / f"{IDENTITY}.part"
        part.write_text(json.dumps({**identity, "styles": styles}, indent=1) + "\n", encoding="utf-8")
        os.replace(part, folder / IDENTITY)
        self._read()

    def _identity(self, identity: dict[str, Any]) -> dict[str, Any]:
        path, do = self.folder / IDENTITY, "give another --out"
        if not path.is_file():
            if any((self.folder / f).exists() for f in ("predictions.jsonl", "results.json", ANSWERS)):
                raise UserError("this folder holds results of another command", self.folder, do)
            return {}
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
            styles = dict(known["styles"])
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError):
            raise UserError("not the identity of a run", path, do) from None
        for key in ("weights", "decode", "seed") if identity["weights"] else ("model", "decode", "seed"):
            if known.get(key) != identity[key]:
                name = "model" if key == "weights" else key
                a, b = (f"{x.get(name)}" for x in (known, identity))
                what = f"this folder holds answers of {name} {a}, not {b}" if a != b else f"{a} has other weights now"
                raise UserError(what, self.folder, do)
        for task, style in identity["styles"].items():
            if styles.get(task, style) != style:
                what = f"this folder holds {task} in style {styles[task]}, not {style}"
                raise UserError(what, self.folder, do)
        return known

    def _read(self) -> None:
        """Reads what is there; a last line that a killed run left unfinished is cut off."""
        if not self.path.is_file():
            return
        data, good = self.path.read_bytes(), 0
        for line in data.splitlines(keepends=True):
            try:
                row = json.loads(line)
                key = (row["task"], row["split"], row["id"], str(row["control"]))
                self.held[key] = (Given(row["answer"], row["scores"]), row["asked"])
            except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
                if good + len(line) < len(data):
                    raise UserError("a broken line between others", self.path, "give another --out") from None
                break
            if not line.endswith(b"\n"):
                break
            good += len(line)
        if good < len(data):
            with self.path.open("r+b") as f:
                f.truncate(good)

    def get(self, key: Key, asked: str) -> Given | None:
        """The stored answer to a question, None when it was never asked.

        Args:
            asked: from :func:`question_id`.

        Raises:
            UserError: under this key something else was asked.
        """
        if key not in self.held:
            return None
        given, before = self.held[key]
        if before != asked:
            raise UserError(f"{key[0]}: item {key[2]} was another question before", self.path, "give another --out")
        return given

    def add(self, rows: list[tuple[Key, str, Given]]) -> None:
        """Appends answers and makes sure that they are on the disk."""
        with self.path.open("a", encoding="utf-8") as f:
            for (task, split, item, control), asked, given in rows:
                row = {"task": task, "split": split, "id": item, "control": control, "asked": asked}
                f.write(json.dumps({**row, "answer": given.answer, "scores": given.scores}, ensure_ascii=False) + "\n")
                self.held[(task, split, item, control)] = (given, asked)
            f.flush()
            os.fsync(f.fileno())


def question_id(words: str, media: list[str], choices: list[str] | None, max_new_tokens: int) -> str:
    """Hash of a question: its words, the names of its media (they may move), its choices and the answer's limit."""
    parts = [words, [Path(m).name for m in media], choices, max_new_tokens]
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode()).hexdigest()[:16]
