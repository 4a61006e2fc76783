"""Unpacks a wheel, an npm archive or a Debian package in pure Python: only files asked for, none outside."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
import zlib
from fnmatch import fnmatchcase
from pathlib import Path
from typing import BinaryIO

AR_MAGIC, AR_HEADER = b"!<arch>\n", 60


class _Window:
    """A file-like view of ``length`` bytes of an open file from where it stands: a member of an ar archive."""

    def __init__(self, file: BinaryIO, length: int):
        self.file, self.left = file, length

    def read(self, n: int = -1) -> bytes:
        data = self.file.read(self.left if n < 0 else min(n, self.left))
        self.left -= len(data)
        return data


def unpack(archive: Path, folder: Path, keep: list[str]) -> int:
    """Unpacks the members that match one of the patterns ``keep`` (all, where it is empty); returns how many files.

    Raises:
        ValueError: the archive is damaged, or of no known kind.
    """
    try:
        with open(archive, "rb") as f:
            magic = f.read(len(AR_MAGIC))
            if magic == AR_MAGIC:
                return _unpack_deb(f, folder, keep)
        if magic[:2] == b"PK":
            return _unpack_zip(archive, folder, keep)
        with tarfile.open(archive, "r:*") as tar:
            return _unpack_tar(tar, folder, keep)
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError) as e:
        raise ValueError(f"{archive.name} is damaged ({e})") from None


def _wanted(name: str, keep: list[str]) -> bool:
    return not keep or any(fnmatchcase(name, pattern) for pattern in keep)


def _unpack_zip(archive: Path, folder: Path, keep: list[str]) -> int:
    with zipfile.ZipFile(archive) as z:
        names = [n for n in z.namelist() if not n.endswith("/") and _wanted(n, keep)]
        for name in names:
            z.extract(name, folder)  # zipfile itself drops "..", drives and leading slashes
        return len(names)


def _unpack_tar(tar: tarfile.TarFile, folder: Path, keep: list[str]) -> int:
    count = 0
    for member in tar:
        name = member.name.removeprefix("./")
        if not member.isfile() or not _wanted(name, keep):
            continue  # no folders (made as needed), no links, no devices
        target = folder / name
        if not target.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{name} points outside the archive")
        source = tar.extractfile(member)
        assert source is not None
        target.parent.mkdir(parents=True, exist_ok=True)
        with source, open(target, "wb") as out:
            shutil.copyfileobj(source, out)
        count += 1
    return count


def _unpack_deb(f: BinaryIO, folder: Path, keep: list[str]) -> int:
    """A .deb is an ar archive: 60-byte headers (name 16, ..., size 10, 2), members padded to even length."""
    while len(header := f.read(AR_HEADER)) == AR_HEADER:
        name, size = header[:16].decode("ascii").strip().rstrip("/"), int(header[48:58])
        if name.startswith("data.tar"):
            kind = name.rpartition(".")[2]
            if kind == "zst" and sys.version_info < (3, 14):  # Ubuntu's packages; where apt is, dpkg-deb is too
                return _unpack_by_dpkg(Path(f.name), folder, keep)
            mode = f"r|{kind}" if kind in ("xz", "gz", "bz2", "zst") else "r|"
            with tarfile.open(fileobj=_Window(f, size), mode=mode) as tar:  # type: ignore[call-overload]
                return _unpack_tar(tar, folder, keep)
        f.seek(size + size % 2, 1)
    raise ValueError("no data in the package")


def _unpack_by_dpkg(archive: Path, folder: Path, keep: list[str]) -> int:
    """The same through dpkg-deb's output, for compressions that this Python cannot read."""
    try:
        process = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(archive)], stdout=subprocess.PIPE)
    except OSError:
        raise ValueError("compressed by zstd, which takes dpkg-deb or Python 3.14 to read") from None
    with process, tarfile.open(fileobj=process.stdout, mode="r|") as tar:
        count = _unpack_tar(tar, folder, keep)
    if process.returncode:
        raise ValueError(f"{archive.name} is damaged (dpkg-deb said so)")
    return count
