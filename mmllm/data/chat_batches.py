"""Which conversations make up batch number n: rows of similar length together, a pure function of seed and number."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from mmllm.data.conversations import (
    IGNORE,
    Conversation,
    Encoded,
    answer_weights,
    assemble,
    collate,
    media_of,
    tokenise_conversation,
)
from mmllm.data.mixtures import Mixture

POOL = 16  # batches whose rows are sorted by length together


def record_media(record: dict[str, Any]) -> list[tuple[str, Any]]:
    """All pictures and sounds of a record, those in its branches included."""
    return media_of(record.get("messages", [])) + [m for b in record.get("branches") or [] for m in media_of(b)]


def rough_length(record: dict[str, Any], picture_tokens: Callable[[Any], int], branches: int | None) -> float:
    """About how many tokens the record's row has, without tokenising it."""

    def characters(messages: Sequence[dict[str, Any]]) -> int:
        n = 0
        for m in messages:
            content = m.get("content") or ""
            texts = [content] if isinstance(content, str) else [p.get("text") or "" for p in content]
            n += 40 + sum(map(len, texts))  # 40: what the template puts around a message, as characters
        return n

    own = record.get("branches") or []
    share = 1.0 if branches is None or len(own) <= branches else branches / len(own)
    pictures = sum(picture_tokens(source) for kind, source in record_media(record) if kind == "image")
    text = characters(record.get("messages", [])) + share * sum(characters(b) for b in own)
    return text / 4 + pictures


class ChatBatches:
    """Batches by number. Every record comes once an epoch, in another order and with other branches each time.

    Args:
        media_inputs: media of a batch in order -> model inputs (cached tower tokens or tensors).
        audio_tokens: source -> LLM tokens of that sound.
        branches_per_row: at most so many branches a row, drawn anew each time; None takes all.
        max_length: longest row in tokens.
        length_normalization: see ``answer_weights``; 0 gives batches without weights.
        mixture: which records an epoch has; None: each once.
        tokenised: records that are so already, by their numbers.
    """

    def __init__(
        self,
        records: Sequence[dict[str, Any]],
        processor: Any,
        media_inputs: Callable[[list[tuple[str, Any]]], dict[str, Tensor]],
        audio_tokens: Callable[[Any], int],
        batch_size: int,
        seed: int,
        branches_per_row: int | None = None,
        max_length: int | None = None,
        length_normalization: float = 0.0,
        mixture: Mixture | None = None,
        tokenised: dict[int, Conversation] | None = None,
    ):
        self.records, self.processor = records, processor
        self.media_inputs, self.audio_tokens = media_inputs, audio_tokens
        self.batch_size, self.seed = min(batch_size, len(records)), seed
        self.branches_per_row, self.max_length = branches_per_row, max_length
        self.length_normalization = length_normalization
        lengths = [rough_length(r, processor.picture_tokens, branches_per_row) for r in records]
        self.lengths = np.asarray(lengths)
        self.mixture = mixture
        self._tokenised = dict(tokenised or {})  # each record is rendered and tokenised once
        self._orders: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()

    def order(self, epoch: int) -> np.ndarray:
        """Record numbers of an epoch as [batches, batch_size]; what does not fill a batch waits for the next epoch."""
        with self._lock:
            if epoch not in self._orders:
                rng = np.random.default_rng((self.seed, epoch))
                mixed = rng.permutation(len(self.records)) if self.mixture is None else self.mixture.epoch(epoch)
                opening = self.mixture.opening // self.batch_size * self.batch_size if self.mixture and not epoch else 0
                parts = [p for p in (mixed[:opening], mixed[opening:]) if len(p) >= self.batch_size]
                self._orders = {epoch: np.concatenate([self._batches(part, rng) for part in parts])}
            return self._orders[epoch]

    def _batches(self, mixed: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Batches of records of like length, in random order, [batches, batch_size]."""
        size = self.batch_size
        pools = [mixed[i : i + POOL * size] for i in range(0, len(mixed) // size * size, POOL * size)]
        batches = [rows for pool in pools for rows in _split(pool[np.argsort(self.lengths[pool], kind="stable")], size)]
        return np.stack([batches[i] for i in rng.permutation(len(batches))])

    def rows(self, number: int) -> tuple[np.ndarray, np.random.Generator]:
        """Record numbers of batch ``number`` and the generator for its draws."""
        per_epoch = len(self.records) // self.batch_size
        epoch, at = divmod(number, per_epoch)
        return self.order(epoch)[at], np.random.default_rng((self.seed, 1, number))

    def conversation(self, index: int) -> Conversation:
        found = self._tokenised.get(index)
        if found is None:
            found = self._tokenised[index] = tokenise_conversation(self.records[index], self.processor)
        return found

    def __call__(self, step: int, rank: int = 0, world: int = 1) -> dict[str, Any]:
        """The batch of one process: token tensors, media inputs and ``num_items``, the weight of its answer tokens."""
        chosen, rng = self.rows(step * world + rank)
        encoded = []
        for index in chosen:
            conversation = self.conversation(int(index))
            n = len(conversation.branches)
            take = n if self.branches_per_row is None else min(n, self.branches_per_row)
            choose = rng.permutation(n)[:take].tolist()
            encoded.append(assemble(conversation, self.processor, self.audio_tokens, choose, self.max_length))
        batch: dict[str, Any] = dict(collate(encoded, self.processor.pad_id))
        return self.finished(batch, encoded)

    def finished(self, batch: dict[str, Any], encoded: Sequence[Encoded]) -> dict[str, Any]:
        """The batch with its media inputs and the weights of its answers."""
        batch |= self.media_inputs([m for row in encoded for m in row.media])
        batch["num_items"] = int((batch["labels"][:, 1:] != IGNORE).sum())
        if self.length_normalization:
            batch["label_weights"] = answer_weights(batch["labels"], self.length_normalization)
            batch["num_items"] = float(batch["label_weights"][:, 1:].sum())
        return batch


def _split(rows: np.ndarray, size: int) -> list[np.ndarray]:
    return [rows[i : i + size] for i in range(0, len(rows) - size + 1, size)]
