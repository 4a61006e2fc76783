"""Lets align reuse the memory of its batches on a CPU, which glibc otherwise gives back and takes anew each step."""

from __future__ import annotations

import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
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
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # macOS, musl, Windows
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGE)) and bool(mallopt(M_TRIM_THRESHOLD, LARGE))
