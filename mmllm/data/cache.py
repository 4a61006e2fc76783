"""The cache: one folder a thing, written aside and renamed when whole, so that half a thing never looks whole."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mmllm.errors import UserError, nearest

OK = ".ok"
PART = ".part"
LOCKS = ".locks"
DOWNLOADS = ".downloads"  # under way; on the cache's own disk
SPARE_BYTES = 200_000_000  # never fill the disk to the last byte


def cache_root() -> Path:
    """``$MMLLM_CACHE``, or ``$XDG_CACHE_HOME/mmllm``, or ``~/.cache/mmllm``. Not created here."""
    own = os.environ.get("MMLLM_CACHE")
    if own:
        return Path(own).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache").absolute() / "mmllm"


def human(n: float) -> str:
    """A number of bytes for reading: ``93 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit != "GB" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} TB"


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def sha256_tree(folder: Path) -> tuple[str, int]:
    """Hex sha256 over (relative path, sha256) of every file below ``folder`` except the ``.ok`` mark, and the bytes."""
    digest, total = hashlib.sha256(), 0
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / OK):
        total += path.stat().st_size
        digest.update(f"{path.relative_to(folder).as_posix()}\0{sha256_file(path)}\n".encode())
    return digest.hexdigest(), total


def require_space(n_bytes: int, folder: Path | None = None) -> None:
    """Checks, before anything is downloaded, that ``n_bytes`` fit on the cache's disk.

    Raises:
        UserError: they do not.
    """
    folder = folder or cache_root()
    there = next(p for p in (folder, *folder.parents) if p.exists())
    free = shutil.disk_usage(there).free
    if free < n_bytes + SPARE_BYTES:
        raise UserError(
            f"not enough disk space: {human(n_bytes + SPARE_BYTES)} needed, {human(free)} free",
            folder,
            "free some space, or set MMLLM_CACHE to a folder on another disk",
        )


def is_writable(folder: Path) -> bool:
    """Whether files can really be made in an existing folder (asking for permission bits is wrong for root)."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """Holds the lock ``name`` of the cache against other processes; makes the cache folder where needed.

    Raises:
        UserError: the cache folder cannot be made or written.
    """
    from filelock import FileLock

    folder = cache_root() / LOCKS
    lock = FileLock(str(folder / f"{name}.lock"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except (OSError, NotImplementedError) as e:
        raise UserError(
            f"cannot write the cache ({getattr(e, 'strerror', None) or e})",
            cache_root(),
            "set MMLLM_CACHE to a writable folder",
        ) from None
    try:
        yield
    finally:
        lock.release()


def entry_path(kind: str, name: str, version: str, sha256: str) -> Path:
    """Where an entry stands: ``<kind>/<name>-<version>-<first 8 of sha256>``."""
    safe = f"{name}-{version}-{sha256[:8]}".replace("/", "_").replace(":", "_").lstrip("@.")
    return cache_root() / kind / safe


def is_whole(path: Path) -> bool:
    """Whether the entry was written to its end."""
    return (path / OK).is_file()


def install(
    kind: str, name: str, version: str, sha256: str, make: Callable[[Path], None], needs_bytes: int = 0
) -> Path:
    """The entry's folder; on the first call ``make(folder)`` fills it aside, then it is marked and renamed into place.

    Args:
        sha256: identifies the content (of the download, or of what it is made from).
        make: fills the empty folder it is given; whatever it raises leaves nothing behind.
        needs_bytes: disk space that making it takes.

    Raises:
        UserError: no disk space, or the cache cannot be written; UserErrors of ``make`` pass through.
    """
    path = entry_path(kind, name, version, sha256)
    if is_whole(path):
        return path
    with locked(f"{kind}-{path.name}"):
        if is_whole(path):  # another process made it while this one waited
            return path
        part = path.with_name(path.name + PART)
        require_space(needs_bytes)
        try:
            for leftover in (part, path):  # of a killed process; the lock says that nobody is at it now
                shutil.rmtree(leftover, ignore_errors=True)
            part.mkdir(parents=True)
            make(part)
            tree, total = sha256_tree(part)
            mark = {"name": name, "version": version, "sha256": sha256, "tree": tree, "bytes": total}
            (part / OK).write_text(json.dumps({**mark, "made": time.strftime("%Y-%m-%d %H:%M:%S")}), encoding="utf-8")
            os.rename(part, path)
        except OSError as e:
            full = e.errno in (errno.ENOSPC, errno.EDQUOT)
            raise UserError(
                f"the disk is full while writing {name}" if full else f"cannot write {name}: {e.strerror or e}",
                cache_root(),
                "free some space, or set MMLLM_CACHE to another folder",
            ) from None
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return path


@dataclass(frozen=True)
class Entry:
    """One folder of the cache. ``state``: whole (marked), built (a folder without a mark) or unfinished."""

    kind: str
    name: str
    path: Path
    bytes: int
    state: str

    @property
    def label(self) -> str:
        return f"{self.kind}/{self.name}"


def entries() -> list[Entry]:
    """Everything in the cache, sorted by kind and name."""
    found = []
    root = cache_root()
    for path in sorted(root.glob("*/*")) if root.is_dir() else []:
        if path.parent.name.startswith(".") and path.parent.name != DOWNLOADS:
            continue
        if path.is_file():
            size, state = path.stat().st_size, "built"
        else:
            size = sum(p.lstat().st_size for p in path.rglob("*") if p.is_file())
            state = "whole" if is_whole(path) else "built"
        if path.name.endswith(PART) or path.parent.name == DOWNLOADS:
            state = "unfinished"
        found.append(Entry(path.parent.name, path.name, path, size, state))
    return found


def select(names: list[str] | tuple[str, ...]) -> list[Entry]:
    """The entries meant by each name: ``kind/name``, a kind, a full name, or the name without version and hash.

    Raises:
        UserError: a name that fits none; says the nearest.
    """
    all_entries = entries()
    chosen: dict[Path, Entry] = {}
    for name in names:
        wanted = name.strip("/")
        hits = [e for e in all_entries if wanted in (e.label, e.kind, e.name) or e.name.startswith(wanted + "-")]
        hits += [e for e in all_entries if e.label.startswith(wanted + "-") and e not in hits]
        if not hits:
            near = nearest(wanted, {n for e in all_entries for n in (e.kind, e.name.rsplit("-", 2)[0])})
            what, do = (
                f"nothing named '{name}' in the cache",
                f"did you mean '{near}'?" if near else "see mmllm cache ls",
            )
            raise UserError(what, cache_root(), do)
        chosen |= {e.path: e for e in hits}
    return list(chosen.values())


def verify(entry: Entry) -> str | None:
    """None when the entry's files are what was written; else what is wrong. Entries without a mark are not checked."""
    if entry.state == "unfinished":
        return "unfinished"
    if entry.state != "whole":
        return None
    try:
        mark = json.loads((entry.path / OK).read_text(encoding="utf-8"))
        tree, _ = sha256_tree(entry.path)
        return None if tree == mark["tree"] else "files were changed, added or lost"
    except (OSError, ValueError, KeyError) as e:
        return f"unreadable ({e.__class__.__name__})"


def remove(entry: Entry) -> None:
    """Deletes one entry: renamed aside first, so that nobody meets half of it.

    Raises:
        UserError: it cannot be deleted.
    """
    lock = f"fetch-{entry.name}" if entry.kind == DOWNLOADS else f"{entry.kind}-{entry.name.removesuffix(PART)}"
    with locked(lock):  # waits while the entry is being written
        try:
            if entry.path.is_file():
                entry.path.unlink()
                return
            aside = entry.path if entry.state == "unfinished" else entry.path.with_name(entry.path.name + PART)
            if aside != entry.path:
                shutil.rmtree(aside, ignore_errors=True)
                os.rename(entry.path, aside)
            shutil.rmtree(aside)
        except OSError as e:
            raise UserError(f"cannot remove {entry.label}: {e.strerror or e}", entry.path) from None
