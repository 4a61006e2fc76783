"""One HTML page with some of a file's records: pictures with boxes drawn, playable sounds, questions and answers."""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from mmllm.data.media import load_image
from mmllm.data.questions import BOX_SCALE
from mmllm.data.records import read_records
from mmllm.errors import UserError

_STYLE = """body{font:15px/1.4 system-ui,sans-serif;margin:2em;background:#fafafa;color:#222}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(280px,1fr));gap:16px}
.card{background:#fff;border:1px solid #ddd;border-radius:8px;padding:12px;overflow-wrap:anywhere}
.card img{max-width:100%;border-radius:4px}.id{color:#777;font-size:12px}.q{margin:.3em 0 0}.a{color:#0a5;margin:0}
@media(prefers-color-scheme:dark){body{background:#181818;color:#ddd}.card{background:#222;border-color:#444}.a{color:#5d9}}"""


def draw_boxes(image: Image.Image, boxes: list[dict[str, Any]], width: int = 320) -> Image.Image:
    """A copy, ``width`` pixels wide, with each box and its text; boxes in 0..1."""
    scale = width / image.width
    out = image.resize((width, max(1, round(image.height * scale))))
    pen = ImageDraw.Draw(out)
    for box in boxes:
        corners = [v * side for v, side in zip(box["xyxy"], (*out.size, *out.size))]
        pen.rectangle(corners, outline="#e0202a", width=2)
        pen.text((corners[0] + 4, corners[1] + 2), str(box.get("text", "")), fill="#e0202a")
    return out


def _picture(path: str, boxes: list[dict[str, Any]]) -> str:
    buffer = io.BytesIO()
    draw_boxes(load_image(path), boxes).save(buffer, "JPEG", quality=85)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def _sound(path: str) -> str:
    kind = {"wav": "wav", "ogg": "ogg", "mp3": "mpeg", "flac": "flac"}.get(Path(path).suffix[1:].lower(), "wav")
    data = base64.b64encode(Path(path).read_bytes()).decode()
    return f'<audio controls src="data:audio/{kind};base64,{data}"></audio>'


def _answer_boxes(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Boxes that an answer gives as text."""
    import re

    found = []
    for message in messages:
        for part in message["content"] if isinstance(message.get("content"), list) else []:
            for numbers in re.findall(r"<box>(\d+),(\d+),(\d+),(\d+)</box>", part.get("text") or ""):
                found.append({"xyxy": [int(v) / BOX_SCALE for v in numbers], "text": ""})
    return found


def _card(record: dict[str, Any]) -> str:
    parts = [f'<div class="id">{html.escape(str(record.get("id", "")))}</div>']
    boxes = record.get("boxes") or []
    for path in [record["image"]] if isinstance(record.get("image"), str) else record.get("image") or []:
        parts.append(_picture(path, boxes))
    if isinstance(record.get("audio"), str) and "messages" not in record:
        parts.append(_sound(record["audio"]))
    threads = [record.get("messages") or [], *(record.get("branches") or [])]
    drawn = [b for t in threads for b in _answer_boxes(t)]
    for message in [m for t in threads for m in t]:
        content = message.get("content")
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content or []:
            if part["type"] == "image" and part.get("path"):
                parts.append(_picture(part["path"], drawn))
            elif part["type"] == "audio" and part.get("path"):
                parts.append(_sound(part["path"]))
            elif part["type"] == "text":
                css = "a" if message["role"] == "assistant" else "q"
                parts.append(f'<p class="{css}">{html.escape(str(part["text"]))}</p>')
    if "messages" not in record and record.get("text"):
        texts = record["text"] if isinstance(record["text"], list) else [record["text"]]
        parts += [f'<p class="q">{html.escape(str(t))}</p>' for t in texts]
    return f'<div class="card">{"".join(parts)}</div>'


def write_preview(file: Path, out: Path, number: int = 24, seed: int = 0) -> Path:
    """Writes a self-contained page with ``number`` records drawn at random with the given seed.

    Raises:
        UserError: the file or its media cannot be read, or the page cannot be written.
    """
    records = read_records(file)
    if not records:
        raise UserError("no records", file)
    chosen = np.random.default_rng(seed).permutation(len(records))[:number]
    cards = "".join(_card(records[i]) for i in sorted(chosen))
    title = html.escape(f"{file.name}: {len(chosen)} of {len(records)} records")
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
        f'<h1>{title}</h1><div class="grid">{cards}</div></html>'
    )
    try:
        out.write_text(page, encoding="utf-8")
    except OSError as e:
        raise UserError(f"cannot be written ({e.strerror})", out) from None
    return out
