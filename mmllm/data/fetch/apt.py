"""Fetches one Debian package by apt-get without being root: its own state folder, nothing of the system is touched."""

from __future__ import annotations

import shutil
from pathlib import Path

from mmllm.data.fetch.common import Unavailable, explain, run


def fetch_apt(package: str, version: str, folder: Path, state: Path) -> Path:
    """Downloads the ``.deb`` into ``folder``: the pinned version, else the one that this system's release carries.

    apt checks the file against the release's signed index. The caller checks the sha256 where the version is the
    pinned one.

    Args:
        state: folder for apt's package lists; filled on the first call, used again on the next.

    Raises:
        Unavailable: no apt-get, no network, no such package.
    """
    apt = shutil.which("apt-get")
    if apt is None:
        raise Unavailable("apt-get is not installed", whole_tool=True)
    options = [
        "-o", f"Dir::State={state}/state", "-o", f"Dir::State::status={state}/status",
        "-o", f"Dir::Cache={state}/cache",
        "-o", "APT::Sandbox::User=", "-o", "Debug::NoLocking=1", "-qq",
    ]  # fmt: skip
    if not (state / "updated").exists():
        for needed in (state / "state/lists/partial", state / "cache/archives/partial"):
            needed.mkdir(parents=True, exist_ok=True)
        (state / "status").touch()
        done = run([apt, *options, "update"], folder)
        if done.returncode != 0:
            reason = explain(done.stderr, "apt-get update")
            raise Unavailable(reason.args[0], whole_tool=True)
        (state / "updated").touch()
    for wanted in (f"{package}={version}", package):
        done = run([apt, *options, "download", wanted], folder)
        archives = sorted(folder.glob("*.deb"))
        if done.returncode == 0 and len(archives) == 1:
            return archives[0]
    if "Unable to locate" in done.stderr or "No candidate" in done.stderr or "no installation candidate" in done.stderr:
        raise Unavailable(f"this system's package lists have no {package}")
    raise explain(done.stderr, "apt-get")
