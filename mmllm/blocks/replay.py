"""Running something a second time as it ran the first time: the same random draws, the same autocast."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch


class Moment:
    """The state of the random generators (torch on CPU and the current GPU, numpy, ``random``) and of autocast."""

    def __init__(self) -> None:
        self.host = random.getstate(), np.random.get_state(), torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
        self.autocast = [
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)) for kind in ("cpu", "cuda")
        ]

    def set_random(self) -> None:
        python, numpy, cpu = self.host
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Within, all is as it was at that moment; afterwards the generators go on as if nothing had been drawn."""
        now = Moment()
        self.set_random()
        try:
            with ExitStack() as stack:
                for kind, dtype, enabled in self.autocast:
                    stack.enter_context(torch.autocast(kind, dtype, enabled))
                yield
        finally:
            now.set_random()
