"""What the three ways of fetching share: running the program, and telling why it failed in a few words."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path


class Unavailable(Exception):
    """The file could not be had here: no program, no network, no such version. ``args[0]`` says why, in a few words.

    ``whole_tool`` is True when nothing else can be had by the same program either.
    """

    def __init__(self, why: str, whole_tool: bool = False):
        super().__init__(why)
        self.whole_tool = whole_tool


class Refused(Exception):
    """A file came, but it is not the pinned one (wrong sha256): never used, never passed over in silence."""


# What the three programs print when the network, not the package, is at fault.
_NO_NETWORK = re.compile(
    r"connection (was )?(broken|error|reset|refused|timed out|aborted|failed)|connecttimeout|newconnectionerror"
    r"|name resolution|getaddrinfo|could not resolve|temporary failure|network is unreachable|no route to host"
    r"|cannot connect to proxy|unable to connect|could not connect|unable to fetch"
    r"|ENOTFOUND|ECONNREFUSED|ECONNRESET|ETIMEDOUT|EAI_AGAIN|ENETUNREACH|ERR_SOCKET_TIMEOUT|ENOTCACHED|failed to fetch",
    re.IGNORECASE,
)
_CUT = re.compile(r"incompleteread|incomplete-download|content-?length|EINTEGRITY|unexpected size", re.I)
_FULL = re.compile(r"no space left on device|ENOSPC|disk quota exceeded", re.IGNORECASE)


def run(argv: list[str], cwd: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Runs a program to its end, its output kept as text.

    Raises:
        Unavailable: the program does not exist.
    """
    try:
        return subprocess.run(
            argv,
            cwd=cwd,
            env={**os.environ, **(env or {})},
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
        )
    except OSError:
        raise Unavailable(f"{argv[0]} is not installed", whole_tool=True) from None


def explain(output: str, tool: str) -> Unavailable:
    """A program's error output in a few words, without addresses.

    Raises:
        OSError: it was the disk (ENOSPC), which is the caller's business.
    """
    if _FULL.search(output):
        import errno

        raise OSError(errno.ENOSPC, "no space left on device")
    if _CUT.search(output):
        return Unavailable("the download was cut off")
    if _NO_NETWORK.search(output):
        return Unavailable("no network connection", whole_tool=True)
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"(error|e|npm err!|npm error)\b[:!]?", line, re.IGNORECASE)] or lines
    text = re.sub(r"\w+://\S+", "(address)", errors[-1] if errors else "no reason given")
    return Unavailable(f"{tool} said: {text[:160]}")


def say(text: str) -> None:
    """One line of progress, on stderr so that results on stdout stay clean."""
    print(text, file=sys.stderr, flush=True)
