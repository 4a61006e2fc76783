"""Requests to token ids and media tensors, each picture or sound processed once however many requests show it."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from mmllm.decode.ops import OPS
from mmllm.decode.requests import Request
from mmllm.decode.spec import DecodeSpec, Op, View
from mmllm.decode.text_views import Messages, change_messages, without_media
from mmllm.decode.views import (
    TENSOR_OPS,
    applies,
    change_picture,
    change_sound,
    change_tensors,
    diffuse_tensors,
    seeded,
    view_seed,
)
from mmllm.errors import UserError

_TEXT_KEYS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
_CACHED_MEDIA = 256


@dataclass
class Media:
    """A picture or sound, read from its file only when it must be processed; equal content has an equal key.

    Attributes:
        ready: processed tensors and number of placeholder tokens, for media that come without their picture.
    """

    kind: str
    key: str
    load: Callable[[], Any]
    ready: tuple[dict[str, Tensor], int] | None = None


@dataclass
class Shown:
    """A picture or sound as one view shows it."""

    media: Media
    ops: tuple[Op, ...] = ()
    seed: int = 0

    @property
    def key(self) -> tuple:
        """Equal for equal tensors."""
        return (self.media.key, self.ops, self.seed if seeded(self.ops) else None)


@dataclass(eq=False)
class Row:
    """One view of a prompt, as it goes into the model.

    Attributes:
        ids: tokens, media placeholders expanded.
        shown: the media in the order of the placeholders.
        model: operations inside the LLM on this row.
        media_places: where the media tokens stand in ``ids``.
        key: equal for rows that may share a prefix: the same media tensors, treated alike inside the model.
        kept: [media tokens] bool, those that operation ``blind`` leaves; set before the prefill.
        directions: [layers, H], what ``steer`` adds; set before the prefill.
    """

    ids: list[int]
    shown: tuple[Shown, ...]
    model: tuple[Op, ...]
    media_places: list[int]
    key: tuple = ()
    kept: Tensor | None = None
    directions: Tensor | None = None

    def __post_init__(self) -> None:
        own = id(self) if any(OPS[op.name].reads for op in self.model) else None
        self.key = (tuple(s.key for s in self.shown), self.model, own)

    @property
    def placeholders(self) -> int:
        """Number of tokens up to and including the last media token."""
        return self.media_places[-1] + 1 if self.media_places else 0


@dataclass
class Prompt:
    """A request made ready.

    Attributes:
        index: place in the caller's list.
        rows: its different rows, view 0 first; views that come out alike share one.
        view_row: for each view, view 0 first, the number of its row.
    """

    index: int
    spec: DecodeSpec
    seed: int
    rows: list[Row] = field(default_factory=list)
    view_row: list[int] = field(default_factory=list)

    @property
    def ids(self) -> list[int]:
        return self.rows[0].ids

    def add(self, row: Row) -> None:
        """Adds the next view's row, or points to an equal one."""
        equal = (i for i, held in enumerate(self.rows) if held.key == row.key and held.ids == row.ids)
        at = next(equal, len(self.rows))
        if at == len(self.rows):
            self.rows.append(row)
        self.view_row.append(at)


class PromptEncoder:
    """Applies the processor: text per request, media once per content."""

    def __init__(self, model: Any, processor: Any):
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        found = {kind: _placeholder(model, processor, kind) for kind in ("image", "audio")}
        self.placeholder_ids = {kind: token for kind, token in found.items() if token is not None}
        self._tensors: OrderedDict[tuple, tuple[dict[str, Tensor], int]] = OrderedDict()
        self._expands: dict[tuple[str, ...], bool] = {}

    def prompt(self, index: int, request: Request, caption: str | None = None) -> Prompt:
        """Token ids and media of all views of a request.

        Args:
            caption: the model's description of the media, where the method needs one.
        """
        messages, media = self._load(request.messages)
        prompt = Prompt(index, request.spec, request.seed)
        for view in (View(model=request.spec.base), *request.spec.views):
            shown = self.shown(view, media, request.seed)
            words = self._words(view, messages, media, caption)
            alike = prompt.rows and not view.text and [s.media for s in shown] == media
            ids = prompt.rows[0].ids if alike else self._ids(words, [s.media for s in shown])
            prompt.add(self.row(ids, shown, view.model))
        return prompt

    def row(self, ids: list[int], shown: list[Shown], model: tuple[Op, ...]) -> Row:
        """A row; what works on media tokens is left out where there are none."""
        special = set(self.placeholder_ids.values())
        places = [i for i, token in enumerate(ids) if token in special]
        return Row(ids, tuple(shown), tuple(op for op in model if places or op.name == "steer"), places)

    def tensors(self, row: Row) -> list[dict[str, Tensor]]:
        """Processed tensors of each of the row's media, first dimension 1."""
        return [self._shown_tensors(item) for item in row.shown]

    def _shown_tensors(self, item: Shown) -> dict[str, Tensor]:
        if item.media.ready:
            tensors = item.media.ready[0]
            for op in item.ops:
                tensors = change_tensors(op, tensors, item.seed)
            return tensors
        raw_ops = tuple(op for op in item.ops if op.name not in TENSOR_OPS)
        tensors = self._process(item.media, raw_ops, item.seed)[0]
        for op in item.ops:
            if op.name in TENSOR_OPS:
                tensors = diffuse_tensors(tensors, op["step"], item.seed)
        return tensors

    def shown(self, view: View, media: list[Media], seed: int) -> list[Shown]:
        """The media as a view shows them, without those that it drops."""
        found = []
        for place, item in enumerate(media):
            ops = tuple(op for op in view.media if applies(op, item.kind))
            if any(op.name == "drop" for op in ops) or any(op.name == "caption" for op in view.text):
                continue
            for op in ops:
                if op.name == "other":
                    item = self._media(item.kind, op["path"])
            ops = tuple(op for op in ops if op.name != "other")
            found.append(Shown(item, ops, view_seed(seed, ops, place)))
        return found

    def _words(self, view: View, messages: Messages, media: list[Media], caption: str | None) -> Messages:
        """The messages of one view."""
        described = any(op.name == "caption" for op in view.text)
        dropping = {
            place for place, m in enumerate(media) if any(o.name == "drop" and applies(o, m.kind) for o in view.media)
        }
        dropped = set(range(len(media))) if described else dropping
        if dropped:
            messages = without_media(messages, dropped, caption if described else None)
        for op in view.text:
            if op.name != "caption":
                messages = change_messages(op, messages)
        return messages

    def _ids(self, messages: Messages, media: list[Media]) -> list[int]:
        """Tokens of the whole prompt.

        Processing all media again for each question on the same picture would cost more than the LLM's forward, so the
        placeholders are expanded here. Each new combination of media kinds is checked once against the processor; a
        processor that does more than repeat its placeholder is called in full every time.
        """
        kinds = tuple(m.kind for m in media)
        if self.processor is self.tokenizer:  # a text-only model: its template wants plain strings
            messages = [{**m, "content": "".join(part["text"] for part in m["content"])} for m in messages]
        if self._expands.get(kinds) is False:
            return self._full_ids(messages, media)
        text = self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = self._expand(self.tokenizer(text, add_special_tokens=False)["input_ids"], media)
        if kinds not in self._expands:
            full = self._full_ids(messages, media)
            self._expands[kinds] = ids == full
            return full
        return ids

    def _full_ids(self, messages: Messages, media: list[Media]) -> list[int]:
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

    def _process(self, item: Media, ops: tuple[Op, ...] = (), seed: int = 0) -> tuple[dict[str, Tensor], int]:
        """Tensors of one picture or sound and the number of its placeholder tokens, from a small cache."""
        key = Shown(item, ops, seed).key
        if key in self._tensors:
            self._tensors.move_to_end(key)
            return self._tensors[key]
        raw: Any = item.load()
        for op in ops:
            raw = change_picture(op, raw, seed) if item.kind == "image" else change_sound(op, raw, seed)
        message = [{"role": "user", "content": [{"type": item.kind, item.kind: raw}]}]
        out = self.processor.apply_chat_template(message, tokenize=True, return_dict=True, return_tensors="pt")
        count = int((out["input_ids"] == self.placeholder_ids[item.kind]).sum())
        made = ({k: v for k, v in out.items() if k not in _TEXT_KEYS and isinstance(v, Tensor)}, count)
        self._tensors[key] = made
        if len(self._tensors) > _CACHED_MEDIA:
            self._tensors.popitem(last=False)
        return made

    def _load(self, messages: list[dict[str, Any]]) -> tuple[Messages, list[Media]]:
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


def _loaded(part: dict[str, Any], media: Iterator[Media]) -> dict[str, Any]:
    return part if part["type"] == "text" else {"type": part["type"], part["type"]: next(media).load()}


def _digest(data: bytes, shape: tuple) -> str:
    return hashlib.sha1(data + repr(shape).encode()).hexdigest()


def _placeholder(model: Any, processor: Any, kind: str) -> int | None:
    """The id of the placeholder token; None for a modality that the model was not built with."""
    if (
        processor is not None
        and getattr(processor, {"image": "image_processor", "audio": "feature_extractor"}[kind], None) is None
    ):
        return None
    for holder in (processor, model.config):
        for name in (f"{kind}_token_id", f"{kind}_token_index"):
            value = getattr(holder, name, None)
            if value is not None:
                return int(value)
    return None
