"""What a source asks of its records: their fields, their texts' length, and the keys that its sampler goes by."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from mmllm.align.config import SourceConfig
from mmllm.align.model import AlignModel
from mmllm.align.reading import FIELD
from mmllm.contracts import Tower
from mmllm.data.captions import captions_of
from mmllm.data.check import TextLimit
from mmllm.errors import UserError, unknown


def texts_of(record: dict[str, Any]) -> list[str]:
    """The record's texts, the label where it has none."""
    return [text for _, text in captions_of(record)]


def text_limit(tower: Tower) -> TextLimit | None:
    """The longest text that a text tower takes; None for one that knows no limit."""
    longest: int | None = getattr(tower, "max_length", None)
    if longest is None:
        return None
    tokenizer = tower.preprocessor()
    return TextLimit(longest, lambda text: len(tokenizer(text, verbose=False)["input_ids"]))


def source_needs(config: SourceConfig, model: AlignModel, long_text: str = "skip") -> tuple[set[str], TextLimit | None]:
    """The fields that a source's records must have, and the tightest limit of its text streams (None with ``cut``)."""
    towers = [model.tower(s) for s in config.streams]
    texts = [t for t in towers if t.modality == "text" and long_text == "skip"]
    return {FIELD[t.modality] for t in towers}, tightest_limit(texts)


def tightest_limit(towers: Sequence[Tower]) -> TextLimit | None:
    """The smallest limit of several text towers; None where there is none."""
    limits = [text_limit(t) for t in towers]
    return min((x for x in limits if x is not None), key=lambda x: x.limit, default=None)


def key_of(record: dict[str, Any], by: str, label: str) -> Any:
    """What a sampler goes by: label, group, id or ``meta.FIELD`` of a record.

    Raises:
        UserError: the record does not have it, or there is no such key.
    """
    if by == "label":
        return label
    name = by.removeprefix("meta.")
    if by not in ("group", "id") and name == by:
        raise unknown("sampler key", by, ["label", "group", "id", "meta.FIELD"])
    value = (record.get("meta") or {}).get(name) if name != by else record.get(by)
    if value is None:
        raise UserError(f"record has no {by}, by which batches are made", record.get("id"))
    return value


def stable_id(text: str) -> int:
    """63 bits that are the same for the same text in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
