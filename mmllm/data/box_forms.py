"""Boxes in pixels, and RefCOCO's fields, as the boxes of a record: ``xyxy`` in 0..1 with a text."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

from mmllm.data.blob import media_file, media_name
from mmllm.errors import UserError, unknown

UNITS, FORMATS = ("normalised", "pixel"), ("xyxy", "xywh")
# Where RefCOCO and its relatives keep what is said about a box; each a text, a list, or RefCOCO's {"sent": ...}.
EXPRESSIONS = ("sentences", "sentence", "expressions", "expression", "phrase", "answer")
STATED = ("box_unit", "box_format", "width", "height", "file_name")
SLACK = 1.0  # pixels by which COCO's rounded boxes stand out of their pictures


def box_fields(row: dict[str, Any]) -> tuple[str, ...]:
    """The fields in which a row holds its boxes, beside ``boxes``."""
    stated = "box_unit" in row or "box_format" in row or ("bbox" in row and any(k in row for k in EXPRESSIONS))
    return ("bbox", *EXPRESSIONS, *STATED) if stated else ()


def with_boxes(record: dict[str, Any], where: object = None) -> dict[str, Any]:
    """The record with ``boxes`` ``[{"xyxy": [x0, y0, x1, y1] in 0..1, "text": ...}]``.

    ``box_unit`` (``normalised`` or ``pixel``) and ``box_format`` (``xyxy`` or ``xywh``) say what its numbers are;
    ``boxes`` without them are normalised xyxy. ``bbox`` with ``sentences`` is RefCOCO's layout: one box, pixels and
    xywh where nothing else is stated, and a text for each sentence. Pixels need ``width`` and ``height``, or the
    picture.

    Raises:
        UserError: an unknown unit or format, a box that is empty or stands out of its picture, or no size to go by.
    """
    if not box_fields(record):
        return record
    coco = "bbox" in record
    unit, form = record.get("box_unit", "pixel" if coco else "normalised"), record.get("box_format")
    form = form or ("xywh" if coco else "xyxy")
    for kind, value, valid in (("box_unit", unit, UNITS), ("box_format", form, FORMATS)):
        if value not in valid:
            raise unknown(kind, str(value), valid, where)
    out = {k: v for k, v in record.items() if k not in box_fields(record)}
    size = _size(record, out.get("image"), where) if unit == "pixel" else (1.0, 1.0)
    raw = [{form: record["bbox"], "text": text} for text in _expressions(record, where)] if coco else []
    out["boxes"] = [_normalised(box, form, size, where) for box in [*(record.get("boxes") or []), *raw]]
    return out


def _normalised(box: Any, form: str, size: tuple[float, float], where: object) -> dict[str, Any]:
    given = (box.get(form) or box.get("xyxy") or box.get("bbox")) if isinstance(box, dict) else None
    if not isinstance(given, list | tuple) or len(given) != 4 or not all(isinstance(v, int | float) for v in given):
        raise UserError(f"a box needs {form} with four numbers, not {box!r:.80}", where)
    x0, y0, x1, y1 = map(float, given)
    if form == "xywh":
        x1, y1 = x0 + x1, y0 + y1
    width, height = size
    slack = SLACK if width > 1 else 1e-6
    if not (-slack <= x0 < x1 <= width + slack and -slack <= y0 < y1 <= height + slack):
        within = f"its picture of {width:.0f}x{height:.0f}" if width > 1 else "0..1"
        raise UserError(f"{form} box {list(given)} is empty or outside {within}", where)
    ends = zip((x0, y0, x1, y1), (width, height) * 2)
    return {**{k: v for k, v in box.items() if k not in FORMATS}, "xyxy": [min(max(v / n, 0.0), 1.0) for v, n in ends]}


def _size(record: dict[str, Any], image: Any, where: object) -> tuple[float, float]:
    """Width and height of the picture in pixels, as stated or from its file's header."""
    stated = [record.get(k) for k in ("width", "height")]
    if all(isinstance(v, int | float) and v > 0 for v in stated):
        return float(stated[0]), float(stated[1])  # type: ignore[arg-type]
    if image is None or isinstance(image, list):
        raise UserError("boxes in pixels need width and height", where)
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(media_file(image)) as opened:
                return float(opened.width), float(opened.height)
    except (OSError, ValueError, Image.DecompressionBombError):
        what = f"no width and height, and {media_name(image)} cannot be opened for them"
        raise UserError(f"boxes in pixels need their picture's size: {what}", where) from None


def _expressions(record: dict[str, Any], where: object) -> Iterator[str]:
    """What is said about a RefCOCO box."""
    said = next((record[k] for k in EXPRESSIONS if record.get(k)), None)
    texts = [(t.get("sent") or t.get("raw")) if isinstance(t, dict) else t for t in said or []]
    if isinstance(said, str):
        texts = [said]
    if not texts or not all(isinstance(t, str) and t.strip() for t in texts):
        raise UserError("a bbox without sentences", where, f"give its expressions in one of {', '.join(EXPRESSIONS)}")
    yield from (str(text) for text in texts)
