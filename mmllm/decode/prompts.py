"""Requests to token ids and media tensors, each picture or sound processed once however many requests show it."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from mmllm.decode.requests import Request
from mmllm.decode.spec import DecodeSpec, View
from mmllm.decode.views import SEEDED, TENSOR_OPS, change_picture, diffuse, view_seed
from mmllm.errors import UserError

_TEXT_KEYS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
_CACHED_MEDIA = 256


@dataclass
class Media:
    """A picture or sound, read from its file only when it must be processed; equal content has an equal key."""

    kind: str
    key: str
    load: Callable[[], Any]


@dataclass
class Prompt:
    """A request made ready.

    Attributes:
        index: place in the caller's list.
        ids: prompt tokens, media placeholders expanded.
        media: in the order of the placeholders.
        placeholders: number of tokens up to and including the last media token.
    """

    index: int
    ids: list[int]
    media: list[Media]
    spec: DecodeSpec
    seed: int
    placeholders: int = 0

    @property
    def views(self) -> tuple[View | None, ...]:
        """View 0 (None) and the further ones; views that change media need media."""
        return (None, *self.spec.views) if self.media else (None,)

    @property
    def group(self) -> tuple:
        """Equal for prompts whose rows have the same media tensors in every view."""
        seeded = any(v is not None and v.op in SEEDED for v in self.views)
        return (tuple(m.key for m in self.media), self.spec, self.seed if seeded else None)


class PromptEncoder:
    """Applies the processor: text per request, media once per content."""

    def __init__(self, model: Any, processor: Any):
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        found = {kind: _placeholder(model, processor, kind) for kind in ("image", "audio")}
        self.placeholder_ids = {kind: token for kind, token in found.items() if token is not None}
        self._tensors: OrderedDict[tuple, tuple[dict[str, Tensor], int]] = OrderedDict()
        self._expands: dict[tuple[str, ...], bool] = {}

    def prompt(self, index: int, request: Request) -> Prompt:
        """Token ids and media of a request."""
        messages, media = self._load(request.messages)
        ids = self._ids(messages, media)
        last = 0
        if media:
            special = set(self.placeholder_ids.values())
            last = 1 + max(i for i, token in enumerate(ids) if token in special)
        return Prompt(index, ids, media, request.spec, request.seed, last)

    def tensors(self, prompt: Prompt, view_index: int) -> list[dict[str, Tensor]]:
        """Processed tensors of each of the prompt's media in one view, first dimension 1."""
        view = prompt.views[view_index]
        result = []
        for place, item in enumerate(prompt.media):
            seed = view_seed(prompt.seed, view_index, place)
            if view is None:
                result.append(self._process(item)[0])
            elif view.op in TENSOR_OPS:
                result.append(_noised(self._process(item)[0], view, seed))
            elif item.kind == "image":
                key = (item.key, view.op, seed if view.op in SEEDED else None)
                result.append(self._process(item, key, lambda x, v=view, s=seed: change_picture(v, x, s))[0])
            else:
                result.append(self._process(item)[0])
        return result

    def _ids(self, messages: list[dict], media: list[Media]) -> list[int]:
        """Tokens of the whole prompt.

        Processing all media again for each question on the same picture would cost more than the LLM's forward, so the
        placeholders are expanded here. Each new combination of media kinds is checked once against the processor; a
        processor that does more than repeat its placeholder is called in full every time.
        """
        kinds = tuple(m.kind for m in media)
        if self._expands.get(kinds) is False:
            return self._full_ids(messages, media)
        text = self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = self._expand(self.tokenizer(text, add_special_tokens=False)["input_ids"], media)
        if kinds not in self._expands:
            full = self._full_ids(messages, media)
            self._expands[kinds] = ids == full
            return full
        return ids

    def _full_ids(self, messages: list[dict], media: list[Media]) -> list[int]:
        left = iter(media)
        if media:
            messages = [{**m, "content": [_loaded(part, left) for part in m["content"]]} for m in messages]
        out = self.processor.apply_chat_template(
            messages, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt"
        )
        return out["input_ids"][0].tolist()

    def _expand(self, ids: list[int], media: list[Media]) -> list[int]:
        kind_of = {token: kind for kind, token in self.placeholder_ids.items()}
        left = iter(media)
        result: list[int] = []
        for token in ids:
            item = next(left, None) if token in kind_of else None
            result.extend([token] * (self._process(item)[1] if item is not None else 1))
        return result

    def _process(self, item: Media, key: tuple | None = None, change: Any = None) -> tuple[dict[str, Tensor], int]:
        """Tensors of one picture or sound and the number of its placeholder tokens, from a small cache."""
        key = key or (item.key,)
        if key in self._tensors:
            self._tensors.move_to_end(key)
            return self._tensors[key]
        raw = change(item.load()) if change else item.load()
        message = [{"role": "user", "content": [{"type": item.kind, item.kind: raw}]}]
        out = self.processor.apply_chat_template(message, tokenize=True, return_dict=True, return_tensors="pt")
        count = int((out["input_ids"] == self.placeholder_ids[item.kind]).sum())
        made = ({k: v for k, v in out.items() if k not in _TEXT_KEYS and isinstance(v, Tensor)}, count)
        self._tensors[key] = made
        if len(self._tensors) > _CACHED_MEDIA:
            self._tensors.popitem(last=False)
        return made

    def _load(self, messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[Media]]:
        """Messages whose content is always a list of parts, without the media themselves; the media in order."""
        loaded, media = [], []
        for message in messages:
            content = message["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
            for i, part in enumerate(parts):
                kind = part["type"]
                if kind == "text":
                    continue
                if kind not in self.placeholder_ids:
                    takes = ", ".join(["text", *self.placeholder_ids])
                    raise UserError(f"this model takes no {kind}", do=f"it takes: {takes}")
                item = self._media(kind, part.get(kind, part.get("path")))
                media.append(item)
                parts[i] = {"type": kind}
            if self.processor is self.tokenizer:  # a text-only model: its template wants plain strings
                parts = "".join(part["text"] for part in parts)
            loaded.append({**message, "content": parts})
        return loaded, media

    def _media(self, kind: str, given: Any) -> Media:
        if isinstance(given, (str, Path)):
            path = Path(given)
            stamp = path.stat().st_mtime_ns if path.exists() else 0
            return Media(kind, f"{path.resolve()}@{stamp}", lambda: self._read(kind, path))
        if kind == "image" and isinstance(given, Image.Image):
            raw = given if given.mode == "RGB" else given.convert("RGB")
            return Media(kind, _digest(raw.tobytes(), raw.size), lambda: raw)
        if kind == "audio" and given is not None:
            raw = np.asarray(given, dtype=np.float32)
            return Media(kind, _digest(raw.tobytes(), raw.shape), lambda: raw)
        raise UserError(f"an {kind} part must hold a path or the {kind} itself, not {type(given).__name__}")

    def _read(self, kind: str, path: Path) -> Any:
        from mmllm.data.media import load_audio, load_image

        return load_image(path) if kind == "image" else load_audio(path, self.sampling_rate)

    @property
    def sampling_rate(self) -> int:
        """Hz of the sounds that the model takes."""
        return int(getattr(getattr(self.processor, "feature_extractor", None), "sampling_rate", 16000))


def join(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors of several media as flat batches; shorter ones are zero-padded at the end of each dimension."""
    joined = {}
    for key in dict.fromkeys(k for part in parts for k in part):
        items = [part[key] for part in parts if key in part]
        shape = [max(sizes) for sizes in zip(*(x.shape[1:] for x in items))]
        out = items[0].new_zeros(sum(len(x) for x in items), *shape)
        row = 0
        for x in items:
            out[(slice(row, row + len(x)), *(slice(0, n) for n in x.shape[1:]))] = x
            row += len(x)
        joined[key] = out
    return joined


def _noised(tensors: dict[str, Tensor], view: View, seed: int) -> dict[str, Tensor]:
    """Noise on the picture or spectrogram, masks left alone.

    Spectrograms are not always normalised to unit variance as pictures are, so they are scaled to it and back: the
    signal-to-noise ratio of a step is then the same for both.
    """
    step = dict(view.args)["step"]
    changed = dict(tensors)
    for key in ("pixel_values", "input_features"):
        if key in tensors:
            x = tensors[key]
            scale = 1.0 if key == "pixel_values" else float(x.float().std()) or 1.0
            changed[key] = diffuse(x / scale, step, seed) * scale
    return changed


def _loaded(part: dict[str, Any], media: Iterator[Media]) -> dict[str, Any]:
    return part if part["type"] == "text" else {"type": part["type"], part["type"]: next(media).load()}


def _digest(data: bytes, shape: tuple) -> str:
    return hashlib.sha1(data + repr(shape).encode()).hexdigest()


def _placeholder(model: Any, processor: Any, kind: str) -> int | None:
    """The id of the placeholder token; None for a modality that the model was not built with."""
    if getattr(processor, {"image": "image_processor", "audio": "feature_extractor"}[kind], None) is None:
        return None
    for holder in (processor, model.config):
        for name in (f"{kind}_token_id", f"{kind}_token_index"):
            value = getattr(holder, name, None)
            if value is not None:
                return int(value)
    return None
