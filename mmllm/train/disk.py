"""Files and folders that are there whole or not at all, whatever kills the process or fills the disk meanwhile."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmllm.errors import UserError

PART, OLD = ".part", ".old"  # endings of what is being written or removed, and of what is being replaced
ROOM = "make room, then go on with --resume"


def sync_folder(folder: Path) -> None:
    """Makes new, renamed and removed names in ``folder`` last: a rename alone may be lost when the power fails."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, data: Any) -> None:
    """Writes JSON so that a reader sees the old file or the new one, never half of it."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a text file so that a reader sees the old one or the new one, also after a failure on the way."""
    part = path.with_name(path.name + PART)
    try:
        with part.open("w", encoding="utf-8") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        part.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink()
        raise
    sync_folder(path.parent)


def publish_folder(part: Path, final: Path) -> None:
    """Renames a finished ``part`` folder to ``final``, after its files and their names have reached the disk."""
    for entry in part.rglob("*"):
        if entry.is_file():
            with entry.open("rb") as f:
                os.fsync(f.fileno())
        elif entry.is_dir():
            sync_folder(entry)
    sync_folder(part)
    old = final.with_name(final.name + OLD)
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    part.rename(final)
    sync_folder(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Takes a folder away under another name, so that a kill on the way leaves none with files missing."""
    going = folder.with_name(folder.name + PART)
    with contextlib.suppress(OSError):
        shutil.rmtree(going, ignore_errors=True)
        folder.rename(going)
        shutil.rmtree(going, ignore_errors=True)


def clear_leftovers(folder: Path) -> None:
    """Clears what a kill left in ``folder``: half-written things go, what was about to be replaced comes back."""
    for entry in folder.glob(f"*{OLD}"):
        whole = entry.with_name(entry.name.removesuffix(OLD))
        if whole.exists():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.rename(whole)
    for entry in folder.glob(f"*{PART}"):
        shutil.rmtree(entry, ignore_errors=True) if entry.is_dir() else entry.unlink()


def disk_failure(error: Exception) -> str | None:
    """Why ``error`` says that something could not be written; None when it is about something else."""
    from safetensors import SafetensorError

    if isinstance(error, OSError):
        return error.strerror or str(error)
    if isinstance(error, SafetensorError):
        return str(error)
    # torch.save tells a full disk in words of its zip writer alone.
    zip_writer = isinstance(error, RuntimeError) and ("inline_container" in str(error) or "PytorchStream" in str(error))
    return "the disk took only a part of it" if zip_writer else None


@contextlib.contextmanager
def writing(what: str, where: Path, do: str = ROOM) -> Iterator[None]:
    """Within, a failure to write ends in one line instead of a traceback.

    Raises:
        UserError: the disk is full, or the place can't be written to.
    """
    try:
        yield
    except Exception as e:
        why = None if isinstance(e, UserError) else disk_failure(e)
        if why is None:
            raise
        raise UserError(f"cannot write {what} ({why})", where, do) from None
