"""Reads the media of a batch when the batch is made, in threads, with other items in place of unreadable ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from mmllm.errors import UserError


class LiveItems:
    """Decodes items by number.

    Args:
        read: (item number, seed) -> the decoded and augmented item; raises UserError where it cannot be read.
        usable: the item numbers that may stand in for others.
        reject: told of every unreadable item, each time it is met; may raise to stop the run.
        workers: threads; decoding releases the interpreter lock.
    """

    def __init__(
        self,
        read: Callable[[int, int | None], Any],
        usable: Sequence[int],
        reject: Callable[[int, UserError], None],
        workers: int = 1,
    ):
        self.read, self.usable, self.reject = read, list(usable), reject
        self.unreadable: dict[int, UserError] = {}
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="media") if workers > 1 else None

    def load(
        self, chosen: Sequence[int], seeds: Sequence[int] | None, rng: np.random.Generator
    ) -> tuple[list[int], list[Any]]:
        """(item numbers, items): the chosen ones, each unreadable one replaced by one drawn with ``rng``.

        Which item is readable is a property of the data, so the result depends on the arguments alone, and a resumed
        run makes the same batch.

        Raises:
            UserError: nothing readable is left.
        """
        chosen = list(chosen)
        drawn: list[int | None] = [None] * len(chosen) if seeds is None else list(seeds)
        items = list((self._pool.map if self._pool else map)(self._try, chosen, drawn))
        spare = None
        for place, seed in enumerate(drawn):
            while isinstance(items[place], UserError):
                self.unreadable[chosen[place]] = items[place]
                self.reject(chosen[place], items[place])
                if spare is None:
                    spare = iter(rng.permutation(len(self.usable)).tolist())
                chosen[place] = self._next(spare, chosen)
                items[place] = self._try(chosen[place], seed)
        return chosen, items

    def _next(self, spare: Any, chosen: list[int]) -> int:
        """The next item that is neither in the batch nor known to be unreadable."""
        for index in spare:
            item = self.usable[index]
            if item not in self.unreadable and item not in chosen:
                return item
        raise UserError("no readable item is left to fill the batch", do="see rejected.jsonl in the run folder")

    def _try(self, item: int, seed: int | None) -> Any:
        if item in self.unreadable:
            return self.unreadable[item]
        try:
            return self.read(item, seed)
        except UserError as e:
            return e
