"""A small OpenAI-style client: pictures and sounds as data URIs, over urllib, so that it needs no further package."""

from __future__ import annotations

import base64
import io
import json
import urllib.error
import urllib.request
import wave
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmllm.errors import UserError

SAMPLING_RATE = 16000


def image_part(image: Any) -> dict[str, Any]:
    """A picture (PIL or path) as a chat content part; PIL pictures go as PNG, so no pixel changes."""
    if isinstance(image, (str, Path)):
        data = Path(image).read_bytes()
    else:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        data = buffer.getvalue()
    return {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(data).decode()}}


def audio_part(audio: Any, sampling_rate: int = SAMPLING_RATE) -> dict[str, Any]:
    """A sound (float array [T] in -1..1, or path of a wav, flac, ogg or mp3) as a chat content part."""
    if isinstance(audio, (str, Path)):
        data, form = Path(audio).read_bytes(), Path(audio).suffix.lstrip(".").lower() or "wav"
    else:
        buffer, form = io.BytesIO(), "wav"
        with wave.open(buffer, "wb") as out:
            out.setnchannels(1)
            out.setsampwidth(2)
            out.setframerate(sampling_rate)
            # Times 32768, as decoders divide by it: a sound read from 16-bit PCM arrives exactly as it was.
            pcm = np.clip(np.asarray(audio, np.float64) * 32768, -32768, 32767)
            out.writeframes(pcm.round().astype("<i2").tobytes())
        data = buffer.getvalue()
    return {"type": "input_audio", "input_audio": {"data": base64.b64encode(data).decode(), "format": form}}


def as_openai(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages in our form (content parts with ``image``, ``audio`` or ``path``) in the form that the API takes."""
    out = []
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            make = {"image": image_part, "audio": audio_part}
            content = [
                make[p["type"]](p.get(p["type"], p.get("path")))
                if p["type"] in make
                else {"type": "text", "text": p["text"]}
                for p in content
            ]
        out.append({"role": message["role"], "content": content})
    return out


def chat_completion(
    url: str, model: str, messages: Sequence[dict[str, Any]], max_tokens: int = 64, timeout: float = 300, **fields: Any
) -> dict[str, Any]:
    """One answer: the API's JSON. ``fields`` go into the request (``temperature``, ``return_token_ids``, ...).

    Raises:
        UserError: nobody answers at ``url``, or the server refuses the request.
    """
    body = {"model": model, "messages": as_openai(messages), "max_tokens": max_tokens, **fields}
    request = urllib.request.Request(
        url.rstrip("/") + "/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=timeout) as answer:
            return json.loads(answer.read())
    except urllib.error.HTTPError as e:
        raise UserError(
            f"the server refused the request ({e.code}): {e.read()[:300].decode(errors='replace')}", url
        ) from None
    except (urllib.error.URLError, OSError) as e:
        raise UserError(
            f"no answer ({getattr(e, 'reason', e)})", url, "is the server running? mmllm serve RUN"
        ) from None
