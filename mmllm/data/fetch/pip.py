"""Fetches one pinned wheel by pip: downloaded, never installed; pip's own settings (indexes, proxies) apply."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from mmllm.data.fetch.common import Refused, Unavailable, explain, run


def fetch_pip(package: str, version: str, sha256: str, folder: Path) -> Path:
    """Downloads the wheel into ``folder``; pip itself checks the hash.

    Raises:
        Refused: another hash.
        Unavailable: no pip, no network, no such version.
    """
    lock = folder / "requirements.txt"
    lock.write_text(f"{package}=={version} --hash=sha256:{sha256}\n", encoding="utf-8")
    options = ["--no-deps", "--only-binary=:all:", "--require-hashes", "--disable-pip-version-check", "--no-input"]
    done = run([sys.executable, "-m", "pip", "download", "-q", *options, "-d", str(folder), "-r", str(lock)], folder)
    lock.unlink()
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    output = done.stderr + done.stdout
    if "DO NOT MATCH THE HASHES" in output:
        got = re.search(r"Got\s+([0-9a-f]{64})", output)
        raise Refused(f"sha256 is {got[1][:12] if got else 'another'}…, expected {sha256[:12]}…")
    if "No module named pip" in output:
        raise Unavailable("this Python has no pip", whole_tool=True)
    # pip ends with "No matching distribution" after a failed connection too, so the connection is looked for first.
    reason = explain(output, "pip")
    if "No matching distribution" in output and not reason.whole_tool:
        raise Unavailable(f"pip's indexes have no {package} {version}")
    raise reason
