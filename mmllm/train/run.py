"""The run folder: one place for a run's config, metrics, checkpoints and result, safe against being cut off."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from mmllm import __version__
from mmllm.config import StrictModel, dump_config
from mmllm.errors import UserError
from mmllm.train.disk import PART, clear_leftovers, publish_folder, remove_folder, write_json, write_text, writing
from mmllm.train.launch import available_cores, is_main, world_size

# Keys that may differ between a run and its resumption: they change what is written, not what is computed.
FREE_ON_RESUME = frozenset({"logging_steps", "save_steps", "save_total_limit", "report_to", "run_name", "prefetch"})
REJECTED = "rejected*.jsonl"
HELD_OUT = "held_out.json"  # of a checkpoint: its loss on held-out items


def describe_machine() -> str:
    """One line: processor, cores we may use, memory, accelerator if any."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    parts = [model, f"{available_cores()} cores"]
    with contextlib.suppress(OSError, ValueError, AttributeError):
        parts.append(f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GB")
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        parts.append(f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}")
    return ", ".join(parts)


def versions() -> dict[str, str]:
    """Versions of what decides the numbers of a run."""
    found = {"mmllm": __version__, "python": platform.python_version()}
    for name in ("torch", "transformers", "accelerate", "peft"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _flatten(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def read_info(path: str | Path) -> dict[str, Any]:
    """The ``run.json`` of a run folder.

    Raises:
        UserError: not a run folder.
    """
    try:
        return json.loads((Path(path) / "run.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        do = "give the folder that a training command wrote (--out)"
        raise UserError("no such folder" if not Path(path).exists() else "not a run folder", path, do) from None
    except (json.JSONDecodeError, NotADirectoryError):
        raise UserError("not a run folder", path, "give the folder that a training command wrote (--out)") from None


def final_folder(path: str | Path, stages: Sequence[str] = ()) -> Path:
    """The ``final/`` of a finished run of one of ``stages`` (any stage when empty).

    Raises:
        UserError: not a run folder, a run of another stage, or one that has not finished.
    """
    info = read_info(path)
    if stages and info.get("stage") not in stages:
        raise UserError(f"this is a run of '{info.get('stage')}'", path, f"give a run of {' or '.join(stages)}")
    final = Path(path) / "final"
    if not final.is_dir():
        raise UserError("this run has not finished", path, f"go on with: mmllm {info.get('stage')} ... --resume")
    return final


class RunFolder:
    """A run's folder: ``config.yaml``, ``metrics.jsonl``, ``checkpoints/``, ``final/``, ``run.json``.

    Made by ``RunFolder.open``. Only process 0 writes.

    Attributes:
        path: the folder.
        stage: the command that owns it ("align", "pretrain", "tune").
        resumed: True when it held an earlier part of the same run (known to process 0 only).
        finished: True when ``final/`` is complete; the stage has nothing left to do.
    """

    def __init__(self, path: Path, stage: str, resumed: bool = False):
        self.path, self.stage, self.resumed = path, stage, resumed
        self._started = time.time()

    @classmethod
    def open(
        cls,
        path: str | Path,
        stage: str,
        config: StrictModel,
        resume: bool = False,
        *,
        seed: int = 0,
        sources: Sequence[dict] = (),
        command: Sequence[str] | None = None,
    ) -> RunFolder:
        """Creates the folder, or opens it to go on.

        With ``resume`` a missing or empty folder is simply started. ``sources`` lists the data sources used, as in the
        data set's ``dataset.json``.

        Raises:
            UserError: the folder belongs to another stage or to something else; it holds a run and ``resume`` is
                False; or the run was started with another config (the first differing key is named) or with another
                number of processes, which would change its batches.
        """
        path = Path(path)
        run = cls(path, stage)
        if not is_main():  # process 0 checks for all, and may be creating the folder at this moment
            return run
        if path.exists() and not path.is_dir():
            raise UserError("not a folder", path, "give another --out")
        if (path / "run.json").exists():
            run._adopt(config, resume)
        elif path.is_dir() and any(not p.match(REJECTED) and p.suffix != PART for p in path.iterdir()):
            raise UserError("this folder holds something else, not a run", path, "give another --out")
        try:
            path.mkdir(parents=True, exist_ok=True)
            for folder in (path, *run.checkpoint_folders()):
                clear_leftovers(folder)
        except OSError as e:
            raise UserError(f"cannot write here ({e.strerror})", path, "give another --out") from None
        if run.finished:
            return run
        before = run.info() if run.resumed else {}
        info = (
            before
            | {  # a stage may keep more there (``update``)
                "stage": stage,
                "status": "running",
                "command": shlex.join(command if command is not None else ["mmllm", *sys.argv[1:]]),
                "seed": seed,
                "versions": versions(),
                "machine": describe_machine(),
                "sources": list(sources),
                "processes": world_size(),
                "started": before.get("started", time.strftime("%Y-%m-%dT%H:%M:%S%z")),
                "seconds": before.get("seconds", 0.0),
            }
        )
        with writing("the run's settings", path, "make room, or give another --out"):
            write_json(path / "run.json", info)  # first: a folder with anything in it is a run's only by this
            part = path / f"config.yaml{PART}"
            dump_config(config, part)
            part.replace(path / "config.yaml")
            run.checkpoints().mkdir(exist_ok=True)
        return run

    def _adopt(self, config: StrictModel, resume: bool) -> None:
        """Checks that the run in the folder is the one that ``config`` describes."""
        info = read_info(self.path)
        if info.get("stage") != self.stage:
            raise UserError(f"this folder holds a run of '{info.get('stage')}'", self.path, "give another --out")
        if not resume:
            raise UserError(
                "this folder already holds a run", self.path, "add --resume to go on, or give another --out"
            )
        began = info.get("processes", 1)
        if began != world_size() and not self.finished:
            what = f"the run began with {began} processes, now there are {world_size()}"
            raise UserError(what, self.path, f"resume with --nproc {began}")
        file = self.path / "config.yaml"
        if file.exists():
            old = _flatten(yaml.safe_load(file.read_text(encoding="utf-8")) or {})
            new = _flatten(config.model_dump(mode="json"))
            for key in sorted(set(old) | set(new)):
                if old.get(key) != new.get(key) and key.rsplit(".", 1)[-1] not in FREE_ON_RESUME:
                    was = f"the run began with {key}={old.get(key)!r}, now it is {new.get(key)!r}"
                    raise UserError(was, self.path, "resume with the same config, or give another --out")
        self.resumed = True

    @property
    def finished(self) -> bool:
        return (self.path / "final").is_dir()

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    def info(self) -> dict[str, Any]:
        """What ``run.json`` says."""
        return read_info(self.path)

    def checkpoints(self, phase: str = "") -> Path:
        """Where the checkpoints of a phase (or of the whole run) lie."""
        return self.path / "checkpoints" / phase if phase else self.path / "checkpoints"

    def checkpoint_folders(self) -> list[Path]:
        """All folders that may hold checkpoints: of the run, and of its phases."""
        root = self.checkpoints()
        phases = [p for p in root.glob("*") if p.is_dir() and not p.name.startswith("checkpoint-")]
        return [root, *phases] if root.is_dir() else []

    def all_checkpoints(self, phase: str = "") -> list[Path]:
        """The complete checkpoints, oldest first; a half-written one is never seen, since it has another name."""
        found = [p for p in self.checkpoints(phase).glob("checkpoint-*") if p.name.split("-")[1].isdigit()]
        return sorted(found, key=lambda p: int(p.name.split("-")[1]))

    def last_checkpoint(self, phase: str = "") -> Path | None:
        """The newest complete checkpoint."""
        return next(reversed(self.all_checkpoints(phase)), None)

    def best_checkpoint(self, phase: str = "") -> Path | None:
        """The checkpoint of the lowest held-out loss, the earlier of equals; None where none was measured."""
        measured = [p for p in self.all_checkpoints(phase) if (p / HELD_OUT).is_file()]
        return min(measured, key=lambda p: json.loads((p / HELD_OUT).read_text())["held_out_loss"], default=None)

    def prune(self, keep: int | None, phase: str = "") -> None:
        """Removes all checkpoints but the last ``keep`` and the best; None keeps all."""
        best = self.best_checkpoint(phase)
        for old in self.all_checkpoints(phase)[:-keep] if keep else []:
            if old != best:
                remove_folder(old)

    def log(self, row: dict[str, Any]) -> None:
        """Appends one line to ``metrics.jsonl``."""
        if is_main():
            with writing("metrics", self.metrics_file), self.metrics_file.open("a", encoding="utf-8") as f:
                f.write(json.dumps(row, ensure_ascii=False) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of ``metrics.jsonl``; a last line cut off by a kill is left out."""
        rows = []
        if self.metrics_file.exists():
            for line in self.metrics_file.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(json.JSONDecodeError):
                    rows.append(json.loads(line))
        return rows

    def forget_after(self, step: int, phase: str = "") -> None:
        """Drops the metric lines of ``phase`` after ``step``: a resumed run writes them again."""
        if is_main() and self.metrics_file.exists():
            rows = [r for r in self.read_metrics() if r.get("phase", "") != phase or r.get("step", 0) <= step]
            with writing("metrics", self.metrics_file):
                write_text(self.metrics_file, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))

    @contextlib.contextmanager
    def begun(self) -> Iterator[None]:
        """Within, a user's mistake that shows before anything was trained takes the new folder away again.

        A list of rejected items stays: it is what the user needs to mend the data.
        """
        try:
            yield
        except UserError:
            unused = not self.resumed and not self.metrics_file.exists() and self.path.is_dir()
            if is_main() and unused and not any(self.checkpoints().rglob("checkpoint-*")):
                for entry in self.path.iterdir():
                    if entry.is_dir():
                        shutil.rmtree(entry)
                    elif not entry.match(REJECTED):
                        entry.unlink()
                if not any(self.path.iterdir()):
                    self.path.rmdir()
            raise

    @contextlib.contextmanager
    def final(self) -> Iterator[Path]:
        """``with run.final() as folder:`` write the result into ``folder``; it becomes ``final/`` only when complete.

        For process 0 alone; afterwards the run is marked finished.
        """
        part = self.path / "final.part"
        shutil.rmtree(part, ignore_errors=True)
        try:
            with writing("the result", self.path / "final"):
                part.mkdir(parents=True)
                yield part
                publish_folder(part, self.path / "final")
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
        self.update(status="finished", finished=time.strftime("%Y-%m-%dT%H:%M:%S%z"))

    def update(self, **values: Any) -> None:
        """Changes entries of ``run.json``; ``seconds`` grows by the time this process has held the folder."""
        if is_main():
            info = self.info()
            now = time.time()
            info["seconds"] = round(info.get("seconds", 0.0) + now - self._started, 1)
            self._started = now
            with writing("run.json", self.path):
                write_json(self.path / "run.json", info | values)
