"""Interleaved documents in the layouts of MMC4 and OBELICS as records: one message of role ``document``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmllm.errors import UserError

DOCUMENT = "document"  # the role of a message that is trained on as it stands, without a chat template
MMC4, OBELICS = ("text_list", "image_info"), ("images", "texts")
# What an entry of MMC4's image_info may call its file; raw_url, where it came from, is no file.
FILES = ("image", "path", "image_name")
PARAGRAPHS = "\n\n"  # between the texts of OBELICS, as its authors join them


def interleaved_fields(row: dict[str, Any]) -> tuple[str, ...]:
    """The fields in which a row holds an interleaved document: those of MMC4, of OBELICS, or none."""
    if isinstance(row.get("text_list"), list):
        return MMC4
    return OBELICS if all(isinstance(row.get(name), list) for name in OBELICS) else ()


def from_interleaved(record: dict[str, Any], where: object = None) -> dict[str, Any]:
    """A row in either layout -> ``{"id", "messages": [{"role": "document", "content": [...]}], "meta"?}``.

    MMC4: ``text_list``, and ``image_info`` whose entries name a file (``image_name``, ``path`` or ``image``) and the
    sentence that they were matched to (``matched_text_index``); a picture stands before its sentence (arXiv
    2304.06939).
    OBELICS: ``images`` and ``texts``, equally long, of which one is None wherever the other is not (arXiv 2306.16527).

    Raises:
        UserError: lists that do not fit together, an index that names no text, or a picture without a file.
    """
    content = _mmc4(record, where) if "text_list" in record else _obelics(record, where)
    if not any(part["type"] == "text" for part in content):
        raise UserError("a document without text", where)
    known = {k: record[k] for k in ("id", "meta") if k in record}
    return {**known, "messages": [{"role": DOCUMENT, "content": content}]}


def is_document(messages: Sequence[dict[str, Any]]) -> bool:
    """Whether messages are a plain document.

    Raises:
        UserError: a document among other turns.
    """
    roles = [message.get("role") for message in messages if isinstance(message, dict)]
    if DOCUMENT in roles and len(roles) > 1:
        raise UserError("a document is one message of role 'document', alone", do="give each document its own record")
    return roles == [DOCUMENT]


def _mmc4(record: dict[str, Any], where: object) -> list[dict[str, Any]]:
    texts, pictures = record["text_list"], record.get("image_info") or []
    before: dict[int, list[dict[str, Any]]] = {}
    for picture in pictures:
        place = picture.get("matched_text_index")
        if not isinstance(place, int) or isinstance(place, bool) or not 0 <= place < len(texts):
            raise UserError(f"matched_text_index {place!r} names none of {len(texts)} texts", where)
        file = next((picture[name] for name in FILES if picture.get(name)), None)
        if file is None:
            raise UserError("a picture without a file in image_info", where, f"give one of {', '.join(FILES)}")
        before.setdefault(place, []).append({"type": "image", "path": file})
    content: list[dict[str, Any]] = []
    for place, text in enumerate(texts):
        content += before.get(place, [])
        _add_text(content, text, " ", where)
    return content


def _obelics(record: dict[str, Any], where: object) -> list[dict[str, Any]]:
    pictures, texts = record["images"], record["texts"]
    if len(pictures) != len(texts):
        raise UserError(f"{len(pictures)} images beside {len(texts)} texts", where, "give lists of one length")
    content: list[dict[str, Any]] = []
    for place, (picture, text) in enumerate(zip(pictures, texts)):
        if (picture is None) == (text is None):
            raise UserError(f"place {place} needs either an image or a text", where, "leave the other one null")
        if picture is not None:
            content.append({"type": "image", "path": picture})
        else:
            _add_text(content, text, PARAGRAPHS, where)
    return content


def _add_text(content: list[dict[str, Any]], text: Any, joint: str, where: object) -> None:
    """Adds a text, and before it the joint where a text stands before it already; empty ones go."""
    if not isinstance(text, str):
        raise UserError(f"a text of a document must be a string, not {text!r:.40}", where)
    if text.strip():
        follows = bool(content) and content[-1]["type"] == "text"
        content.append({"type": "text", "text": (joint if follows else "") + text})
