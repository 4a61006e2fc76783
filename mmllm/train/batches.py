"""Batches by number, made ahead by a background thread, so that a resumed run needs no sampler state."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from torch.utils.data import Dataset

BatchFn = Callable[[int, int, int], Any]


class StepBatches(Dataset):
    """Micro-batch number i as item i, with the next ones made ahead by one background thread.

    Because a batch depends on nothing but its number, a resumed run asks for its first missing number and no sampler
    state has to be stored.
    """

    def __init__(self, batch_fn: BatchFn, length: int, rank: int, world: int, prefetch: int):
        self.batch_fn, self.length, self.rank, self.world, self.prefetch = batch_fn, length, rank, world, prefetch
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="batches") if prefetch else None
        self._ahead: deque[tuple[int, Future]] = deque()

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        if self._pool is None:
            return self.batch_fn(index, self.rank, self.world)
        if not self._ahead or self._ahead[0][0] != index:
            self._drop()
            self._ahead.append((index, self._pool.submit(self.batch_fn, index, self.rank, self.world)))
        while len(self._ahead) <= self.prefetch and self._ahead[-1][0] + 1 < self.length:
            following = self._ahead[-1][0] + 1
            self._ahead.append((following, self._pool.submit(self.batch_fn, following, self.rank, self.world)))
        return self._ahead.popleft()[1].result()

    def _drop(self) -> None:
        for _, future in self._ahead:
            future.cancel()
        self._ahead.clear()

    def close(self) -> None:
        """Ends the background thread."""
        self._drop()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None
