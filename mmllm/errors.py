"""The one error class for mistakes a user can mend, and the search for the nearest valid name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A user's mistake, told in one line: what is wrong, where, and what to do.

    The command line prints it as ``error: ...`` and exits with 2; it never shows a traceback for it.

    Args:
        what: what is wrong.
        where: file and line, or config key.
        do: what the user can do about it.
    """

    def __init__(self, what: str, where: object | None = None, do: str | None = None):
        self.what, self.where, self.do = what, where, do
        text = f"{where}: {what}" if where is not None else what
        super().__init__(" ".join((f"{text}; {do}" if do else text).split()))


def nearest(name: str, valid: Iterable[str]) -> str | None:
    """The valid name closest to ``name``, or None when nothing is close."""
    names = [str(v) for v in valid if str(v)]
    if not str(name):
        return None
    found = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    if found:
        return found[0]
    prefixed = [v for v in names if v.startswith(str(name)) or str(name).startswith(v)]
    return prefixed[0] if prefixed else None


def unknown(kind: str, name: str, valid: Iterable[str], where: object | None = None) -> UserError:
    """The error for a name that does not exist, naming the nearest valid one."""
    names = sorted(str(v) for v in valid)
    near = nearest(name, names)
    do = f"did you mean '{near}'?" if near else f"valid: {', '.join(names) or 'none'}"
    return UserError(f"unknown {kind} '{name}'", where, do)
