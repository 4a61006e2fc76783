"""Python's garbage collector where processes are short and load much: few collections, none at the end."""

from __future__ import annotations

import atexit
import gc


def few_collections() -> None:
    """For a process of its own (the command line, a worker): importing torch and transformers alone starts hundreds of
    collections otherwise, and at its end Python looks through all that was imported, three times.

    Objects that count their references are freed as before; what is in circles waits longer.
    """
    gc.set_threshold(50_000, 20, 50)
    atexit.register(gc.freeze)
