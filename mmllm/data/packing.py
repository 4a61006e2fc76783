"""Which conversations share a packed row: the longest one left, with those that fill its rest best."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmllm.data.chat_batches import ChatBatches
from mmllm.data.conversations import IGNORE, Encoded, assemble, media_tokens
from mmllm.data.fitting import chosen_parts, grown_ends

POOL = 2048  # records that are planned together
FULL = 0.98  # rows emptier than this wait for the next pool, up to WAIT of them
WAIT = 8
CHOICE = 128  # items that are tried together for the rest of a row


def plan_rows(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Items to rows of at most ``row_length``; an item longer than that has a row of its own.

    Each row begins with the longest item left, and takes those others that fill its rest best, looked for among
    ``CHOICE`` of all lengths that are left; where several sets do, the one with longer items, since short ones fill
    later rows more easily.

    Returns:
        Numbers of the items of each row; every item is in one.
    """
    left = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    rows: list[list[int]] = []
    while left:
        first = left.pop(0)
        room = row_length - lengths[first]
        fitting = bisect_left(left, -room, key=lambda i: -lengths[i]) if room > 0 else len(left)
        step = max(1, -(-(len(left) - fitting) // CHOICE))
        places = range(fitting, len(left), step)
        taken = [places[k] for k in fill_best([lengths[left[at]] for at in places], room)]
        rows.append([first, *(left[at] for at in taken)])
        for at in reversed(taken):
            del left[at]
    return rows


def fill_best(lengths: Sequence[int], room: int) -> list[int]:
    """Which items fill ``room`` best without passing it (subset sum), earlier ones before later ones; their numbers.

    Sums that can be reached are the bits of an integer, so a row costs microseconds.
    """
    if room <= 0 or not lengths:
        return []
    reach, mask = [1], (1 << (room + 1)) - 1
    for length in lengths:
        reach.append((reach[-1] | reach[-1] << length) & mask)
    total, taken = reach[-1].bit_length() - 1, []
    for k in range(len(lengths) - 1, -1, -1):
        if not reach[k] >> total & 1:  # not without this one
            taken.append(k)
            total -= lengths[k]
    return taken[::-1]


def fill_rate(rows: Sequence[Sequence[int]], lengths: Sequence[int], row_length: int) -> float:
    """The share of all rows' places that hold a token."""
    return sum(lengths[i] for row in rows for i in row) / (len(rows) * row_length)


def collate_packed(rows: Sequence[Encoded]) -> dict[str, Tensor]:
    """Encoded conversations one after the other in one row: all tensors are [1, T], without any padding.

    ``document_ids`` numbers the conversations, ``position_ids`` start anew in each; ``branch_ids`` only where one has
    branches. The first token of a document is nothing to predict: what stands before it is another one.
    """

    def joined(name: str) -> Tensor:
        return torch.tensor([x for row in rows for x in getattr(row, name)], dtype=torch.long)[None]

    counts = torch.tensor([len(row.input_ids) for row in rows])
    labels = joined("labels")
    labels[0, counts.cumsum(0) - counts] = IGNORE
    batch = {
        "input_ids": joined("input_ids"),
        "labels": labels,
        "position_ids": joined("position_ids"),
        "document_ids": torch.arange(len(rows)).repeat_interleave(counts)[None],
    }
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    branch_ids = joined("branch_ids")
    if int(branch_ids.max()) > 1:
        batch["branch_ids"] = branch_ids
    return batch


class PackedBatches(ChatBatches):
    """Batches by number, of packed rows; every record comes once an epoch, and none waits for the next.

    Rows are planned pool by pool in the order of the epochs, so batch n is the same whoever asks for it, when, and in
    which order; a record is tokenised when its pool is planned.

    Args:
        batch_size: rows in a batch; they are laid out as one row of documents.
        row_length: most tokens of a row; others as in ChatBatches, ``max_length`` must not be larger.
    """

    def __init__(self, records: Sequence[dict[str, Any]], *args: Any, row_length: int, **kwargs: Any):
        super().__init__(records, *args, **kwargs)
        self.rows_a_batch: int = kwargs.get("batch_size") or args[3]
        self.row_length = row_length
        self._rows: list[list[tuple[int, int]]] = []  # (epoch, record) of each document
        self._ends: list[int] = []  # rows planned at the end of each epoch
        self._waiting: list[tuple[int, int]] = []
        self._next = (0, 0)  # epoch, first record of its order that is not planned
        self._tokens = 0
        self._sizes: dict[int, tuple[int, list[list[int]]]] = {}  # tokens of prefix, ends of branches

    # ---- what a document is ----

    def choose(self, epoch: int, index: int) -> list[int]:
        """The branches that a record shows in an epoch."""
        n = len(self.conversation(index).branches)
        take = n if self.branches_per_row is None else min(n, self.branches_per_row)
        return np.random.default_rng((self.seed, 3, epoch, index)).permutation(n)[:take].tolist()

    def length(self, epoch: int, index: int) -> int:
        """Tokens of a record's document in an epoch, counted without making it."""
        if index not in self._sizes:
            c = self.conversation(index)
            marks = (self.processor.image_token_id, self.processor.audio_token_id)
            count = media_tokens(self.processor, self.audio_tokens)
            prefix = grown_ends(c.prefix, c.prefix_media, marks, count)[-1]
            ends = [grown_ends(b, m, marks, count) for b, m in zip(c.branches, c.branch_media)]
            self._sizes[index] = prefix, ends
        prefix, ends = self._sizes[index]
        return prefix + sum(n for _, n in chosen_parts(prefix, ends, self.choose(epoch, index), self.max_length))

    # ---- the plan ----

    def _order(self, epoch: int) -> np.ndarray:
        """The records of an epoch in the order in which they are planned; the last one is kept."""
        if epoch not in self._orders:
            plain = np.random.default_rng((self.seed, epoch))
            drawn = plain.permutation(len(self.records)) if self.mixture is None else self.mixture.epoch(epoch)
            self._orders = {epoch: drawn}
        return self._orders[epoch]

    def _plan_pool(self) -> None:
        epoch, at = self._next
        order = self._order(epoch)
        opening = self.mixture.opening if self.mixture is not None and epoch == 0 else 0
        stop = min(at + POOL, opening) if at < opening else at + POOL  # what comes first is planned by itself
        last = stop >= len(order)
        documents = [*self._waiting, *((epoch, int(i)) for i in order[at:stop])]
        lengths = [self.length(e, i) for e, i in documents]
        rows = plan_rows(lengths, self.row_length)
        used = [sum(lengths[i] for i in row) for row in rows]
        wait: set[int] = set()
        if not last:
            emptiest = sorted(range(len(rows)), key=lambda r: used[r])[:WAIT]
            wait = {r for r in emptiest if used[r] < FULL * self.row_length}
        self._waiting = [documents[i] for r in sorted(wait) for i in rows[r]]
        kept = [r for r in range(len(rows)) if r not in wait]
        for n in np.random.default_rng((self.seed, 4, epoch, at)).permutation(len(kept)):
            self._rows.append([documents[i] for i in rows[kept[n]]])
            self._tokens += used[kept[n]]
        self._next = (epoch + 1, 0) if last else (epoch, stop)
        if last:
            self._ends.append(len(self._rows))

    def packed_rows(self, number: int) -> list[list[tuple[int, int]]]:
        """The rows of batch ``number``: (epoch, record) of each document."""
        end = (number + 1) * self.rows_a_batch
        with self._lock:
            while len(self._rows) < end:
                self._plan_pool()
            return self._rows[end - self.rows_a_batch : end]

    def rows_an_epoch(self) -> int:
        """Rows of the first epoch; plans all of it."""
        with self._lock:
            while not self._ends:
                self._plan_pool()
            return self._ends[0]

    @property
    def fill(self) -> float:
        """The share of the planned rows' places that hold a token."""
        return self._tokens / max(len(self._rows) * self.row_length, 1)

    def __call__(self, step: int, rank: int = 0, world: int = 1) -> dict[str, Any]:
        """The batch of one process: token tensors [1, T], media inputs and ``num_items``."""
        encoded = [
            assemble(self.conversation(i), self.processor, self.audio_tokens, self.choose(e, i), self.max_length)
            for row in self.packed_rows(step * world + rank)
            for e, i in row
        ]
        batch: dict[str, Any] = dict(collate_packed(encoded))
        return self.finished(batch, encoded)
