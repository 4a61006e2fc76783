"""Why a conversation cannot be trained on, as far as one sees without decoding its media or tokenising its text."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

from mmllm.data.check import box_problem, thread_problems
from mmllm.data.conversations import media_of
from mmllm.data.interleaved import DOCUMENT, is_document
from mmllm.errors import UserError


def conversation_problem(record: dict[str, Any]) -> str | None:
    """The first problem of a record with ``messages``, None when there is none.

    Unknown roles and kinds of parts, no answer, empty texts, media that are no file here, boxes out of range, a
    document among other turns.
    """
    threads = [record["messages"], *(record.get("branches") or [])]
    for thread in threads:
        problem = next(thread_problems(thread, _missing), None)
        if problem is not None:
            return problem
    roles = {m["role"] for t in threads for m in t}
    if "assistant" not in roles and DOCUMENT not in roles:
        return "no assistant turn"
    try:
        if is_document(record["messages"]) and len(threads) > 1:
            return "a document has no branches"
        for thread in threads:
            media_of(thread)
    except UserError as e:
        return e.what
    return next((p for text in _texts(threads) if (p := box_problem(text)) is not None), None)


def _missing(kind: str, path: Any) -> Iterator[str]:
    if isinstance(path, str) and not path.startswith("data:"):
        if "://" in path:
            yield f"{path}: {kind} on the net, fetch it first"
        elif not os.path.isfile(path):
            yield f"{path}: no such {kind}"


def _texts(threads: Sequence[Sequence[dict[str, Any]]]) -> Iterator[str]:
    """The texts that stand in messages as plain strings; ``thread_problems`` has looked at the parts."""
    return (m["content"] for thread in threads for m in thread if isinstance(m["content"], str))
