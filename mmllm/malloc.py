"""What glibc does with memory: kept for the next batch of align, or zeroed for a library that reads it unwritten."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_PERTURB = -1, -3, -6  # of malloc.h
LARGE = 2**30
SET_BY_USER = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Blocks up to 1 GiB come from the heap, and up to 1 GiB at its end stays when it is free.

    New pages must be mapped and zeroed: batches of features (12 MB and more a tensor) cost some 15,000 page faults a
    step without this, a tenth of its time and more. Tuning an LLM has few and gets slower by it, so it is for align
    alone. What the user has set stays.

    Returns:
        whether it was done; False with another libc.
    """
    if any(name in os.environ for name in SET_BY_USER):
        return False
    return mallopt(M_MMAP_THRESHOLD, LARGE) and mallopt(M_TRIM_THRESHOLD, LARGE)


@contextlib.contextmanager
def zeroed_memory() -> Iterator[None]:
    """New memory is zero inside, for code whose result hangs on memory that it never wrote; elsewhere than with glibc
    nothing changes."""
    mallopt(M_PERTURB, 0xFF)  # new bytes get the complement of this
    try:
        yield
    finally:
        mallopt(M_PERTURB, 0)


def mallopt(option: int, value: int) -> bool:
    """glibc's own; False with another libc."""
    try:
        return bool(ctypes.CDLL(None).mallopt(option, value))
    except (OSError, AttributeError, TypeError):  # macOS, musl, Windows
        return False
