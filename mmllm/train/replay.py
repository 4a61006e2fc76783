"""Conversations without media mixed into a run's records, so that an LLM goes on doing what it did before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mmllm.data.chat_batches import record_media
from mmllm.errors import UserError


def mix_replay(
    records: Sequence[dict[str, Any]], replay: Sequence[dict[str, Any]], weight: float, seed: int
) -> list[dict[str, Any]]:
    """The records, and so many of ``replay`` that they are ``weight`` of all.

    Which of them is drawn by the seed, each as often as the others or once more.

    Raises:
        UserError: no record to draw from, one with media, or one that is no conversation.
    """
    if not replay:
        raise UserError("no records", "replay.data")
    for record in replay:
        if not record.get("messages"):
            raise UserError("no conversation (it has no messages)", f"replay, record {record.get('id')}")
        if record_media(record):
            what = "replay is text alone, this record has media"
            raise UserError(what, f"replay, record {record.get('id')}", "list its file under data")
    count = max(1, round(len(records) * weight / (1 - weight)))
    order = np.random.default_rng((seed, 5)).permutation(len(replay))
    return [*records, *(replay[int(order[i % len(order)])] for i in range(count))]
