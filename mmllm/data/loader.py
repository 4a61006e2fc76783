"""How many threads read media, and how many batches are made ahead, on this machine."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LoaderPlan:
    """How batches are made beside training: threads that decode media, and batches made ahead."""

    workers: int
    prefetch: int


def loader_plan(device: str, cores: int, processes: int = 1) -> LoaderPlan:
    """What suits a machine.

    On a CPU the training itself needs all cores, and a second thread with its own OpenMP team slows it: batches are
    made between the steps, with every core decoding. Beside an accelerator the cores have nothing else to do: they
    decode ahead of it, but for one that drives it, and the more of them there are the more uneven their work may be.

    Args:
        cores: that this machine lets us use; ``processes`` training processes share them.
    """
    share = max(1, cores // processes)
    if device == "cpu":
        return LoaderPlan(share, 0)
    return LoaderPlan(min(16, max(1, share - 1)), 2 if share < 8 else 4)
