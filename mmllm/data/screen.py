"""Keeps from training what cannot be trained on, without decoding anything: the rest goes to ``rejected.jsonl``."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from mmllm.data.captions import captions_of
from mmllm.data.check import TextLimit, missing_fields, repeated_id
from mmllm.data.records import MEDIA_FIELDS, Located
from mmllm.data.rejected import Rejected


def usable_records(
    items: Iterable[Located],
    source: str,
    rejected: Rejected,
    needs: Collection[str] = (),
    text_limit: TextLimit | None = None,
    languages: Sequence[str] | None = None,
    optional: Collection[str] = (),
) -> list[dict[str, Any]]:
    """The records that a training source can use.

    Left out are broken lines, repeated ids, records that lack a needed field or its file, and records without a text
    that is neither empty nor too long nor in another language; of several texts the good ones remain.

    Args:
        optional: needed fields that a record may lack as long as it has two of those needed.

    Raises:
        UserError: more are rejected than allowed.
    """
    good: list[dict[str, Any]] = []
    seen: dict[tuple[str, str], int | str] = {}
    total = 0
    for item in items:
        total += 1
        problem = item.problem
        if item.record is not None:
            has = [f for f in needs if f not in optional or has_field(item.record, f)]
            problem = repeated_id(item, seen) or unusable(item.record, has)
            if problem is None and optional and len(has) < min(2, len(needs)):
                problem = f"has only {' and '.join(has) or 'none'} of {', '.join(sorted(needs))}"
        if item.record is not None and problem is None and "text" in has:
            item.record, problem = with_usable_texts(item.record, text_limit, languages)
        if item.record is not None and problem is None:
            good.append(item.record)
        else:
            rejected.add(source, item.where, item.where, str(problem))
    rejected.expect(source, total)
    rejected.check(source)
    return good


def has_field(record: dict[str, Any], field: str) -> bool:
    """Whether a record has something in a field; a label stands in for a text."""
    return bool(captions_of(record) if field == "text" else record.get(field))


def unusable(record: dict[str, Any], needs: Collection[str]) -> str | None:
    """Why a record cannot be used for fields ``needs``; None when it can as far as one sees without decoding."""
    problem = next(missing_fields(record, needs), None)
    for field in needs if problem is None else ():
        paths = record[field] if field in MEDIA_FIELDS else []
        for path in paths if isinstance(paths, list) else [paths]:
            if isinstance(path, str) and not os.path.exists(path):
                return f"{path}: no such file"
    return problem


def with_usable_texts(
    record: dict[str, Any], limit: TextLimit | None, languages: Sequence[str] | None = None
) -> tuple[dict[str, Any], str | None]:
    """The record with its good texts only, and why none is left where none is."""
    captions = captions_of(record, languages)
    if not captions:
        return record, f"no text in {' or '.join(languages)}" if languages else "empty text"
    reasons = [_text_problem(text, limit) for _, text in captions]
    kept = [c for c, reason in zip(captions, reasons, strict=True) if reason is None]
    if not kept:
        return record, next((r for r in reasons if r), "empty text")
    if len(kept) == len(captions_of(record)):
        return record, None
    if any(language for language, _ in kept):
        remain = dict.fromkeys(language for language, _ in kept)
        return {**record, "text": {key: [t for k, t in kept if k == key] for key in remain}}, None
    return {**record, "text": [t for _, t in kept]}, None


def _text_problem(text: Any, limit: TextLimit | None) -> str | None:
    if not isinstance(text, str) or not text.strip():
        return "empty text"
    return limit.problem(text) if limit is not None else None
