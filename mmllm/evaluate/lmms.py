"""Answers requests of lmms-eval with our decoder; lmms-eval itself is imported by the manifest alone."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmllm.errors import UserError

MAX_NEW_TOKENS = 128  # for tasks that give no limit
VIDEO_FRAMES = 8
SOUNDS = (".wav", ".flac", ".ogg", ".mp3", ".m4a")
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
PLACEHOLDERS = ("<image>", "<video>", "<audio>")

Documents = Mapping[str, Mapping[str, Any]]  # task -> split -> documents, as lmms-eval keeps them
Reader = Callable[[Any, Documents], list[dict[str, Any]]]


def manifest() -> Any:
    """What lmms-eval's entry point group ``lmms_eval.models`` wants: one name for the chat and the simple class."""
    from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]

    home = "mmllm.evaluate.lmms_models"
    return ModelManifest("mmllm", simple_class_path=f"{home}.MmllmSimple", chat_class_path=f"{home}.MmllmChat")


class Bridge:
    """Generation and likelihood for lmms-eval's requests.

    Args:
        decoder: ours, or anything with its ``generate``, ``score`` and ``encoder``.
        decode: decoding method; a task that wants to sample does so only where this is ``greedy``.
        video_frames: frames that stand for a video, as so many pictures.
    """

    def __init__(self, decoder: Any, decode: str = "greedy", video_frames: int = VIDEO_FRAMES):
        from mmllm.decode import parse_spec

        self.decoder, self.decode, self.video_frames = decoder, str(parse_spec(decode)), video_frames

    def generate(self, messages: Sequence[list[dict[str, Any]]], settings: Sequence[Mapping[str, Any]]) -> list[str]:
        """One answer per conversation, in the order of the requests.

        Args:
            settings: each request's ``generation_kwargs``: ``max_new_tokens``, ``until``, ``do_sample``,
                ``temperature``, ``top_p``, ``top_k``; ``num_beams`` other than 1 is refused, others are for the task.

        Raises:
            UserError: beams.
        """
        requests = [self._request(m, s) for m, s in zip(messages, settings, strict=True)]
        return [r.text for r in self.decoder.generate(requests)] if requests else []

    def _request(self, messages: list[dict[str, Any]], settings: Mapping[str, Any]) -> Any:
        from mmllm.decode import Request

        if int(settings.get("num_beams") or 1) != 1:
            raise UserError("beams are not decoded here", f"num_beams={settings['num_beams']}", "set num_beams: 1")
        until = settings.get("until") or ()
        stop = (until,) if isinstance(until, str) else tuple(x for x in until if x)
        limit = int(settings.get("max_new_tokens") or settings.get("max_gen_toks") or MAX_NEW_TOKENS)
        seed = zlib.crc32(repr([p.get("text") for m in messages for p in m["content"]]).encode())
        return Request(messages, self.method(settings), max_new_tokens=limit, stop=stop, seed=seed)

    def method(self, settings: Mapping[str, Any]) -> str:
        """The decoding method of a request: ours, or sampling where the task asks for it and ours is greedy."""
        temperature = float(settings.get("temperature") or 0)
        if self.decode != "greedy" or temperature <= 0 or settings.get("do_sample") is False:
            return self.decode
        further = [f"{k}={settings[k]}" for k in ("top_p", "top_k") if settings.get(k) not in (None, 0)]
        return ",".join([f"sample:temperature={temperature:g}", *further])

    def likelihood(
        self, messages: Sequence[list[dict[str, Any]]], answers: Sequence[str]
    ) -> list[tuple[float, bool]]:  # fmt: skip
        """(log-probability of the answer in nats, whether greedy decoding gives it) of each conversation.

        The space with which lmms-eval parts question and answer is left off: in a chat the answer starts a turn.
        Requests of one conversation with several answers share its prefill.

        Raises:
            UserError: an empty answer.
        """
        from mmllm.decode import Request

        groups: dict[str, list[int]] = {}
        for i, conversation in enumerate(messages):
            groups.setdefault(_key(conversation), []).append(i)
        firsts = [some[0] for some in groups.values()]
        bare = [a.lstrip(" ") for a in answers]
        tokens = [self._tokens(a) for a in bare]
        asked = [Request(messages[i], self.decode) for i in firsts]
        scores = self.decoder.score(asked, [[bare[i] for i in some] for some in groups.values()])
        longest = [max(len(tokens[i]) for i in some) for some in groups.values()]
        greedy = self.decoder.generate(
            [Request(messages[i], self.decode, max_new_tokens=n) for i, n in zip(firsts, longest)]
        )
        out: list[tuple[float, bool]] = [(0.0, False)] * len(messages)
        for some, values, said in zip(groups.values(), scores, greedy):
            for i, value in zip(some, values):
                out[i] = (float(value), list(said.token_ids[: len(tokens[i])]) == tokens[i])
        return out

    def _tokens(self, text: str) -> list[int]:
        return list(self.decoder.encoder.tokenizer(text, add_special_tokens=False)["input_ids"])

    def parts(self, media: Any) -> list[dict[str, Any]]:
        """Whatever ``doc_to_visual`` gives as parts of a message; lists are flattened, None is nothing.

        Raises:
            UserError: something that is no picture, sound or video.
        """
        if media is None:
            return []
        if isinstance(media, list | tuple):
            return [part for item in media for part in self.parts(item)]
        if isinstance(media, dict) and "array" in media:
            return [self._sound(np.asarray(media["array"]), int(media["sampling_rate"]))]
        if hasattr(media, "get_all_samples"):  # what newer versions of datasets give for a sound
            heard = media.get_all_samples()  # pyright: ignore[reportAttributeAccessIssue]
            return [self._sound(np.asarray(heard.data), int(heard.sample_rate))]
        if hasattr(media, "convert") and hasattr(media, "size"):
            return [{"type": "image", "image": media}]
        if isinstance(media, str | Path):
            return self._file(Path(media))
        raise UserError(f"no picture, sound or video: {type(media).__name__}", "doc_to_visual")

    def _file(self, path: Path) -> list[dict[str, Any]]:
        suffix = path.suffix.lower()
        if suffix in SOUNDS or suffix in PICTURES:
            return [{"type": "audio" if suffix in SOUNDS else "image", "path": str(path)}]
        from mmllm.data.video import load_video

        return [{"type": "image", "image": frame} for frame in load_video(path, self.video_frames)]

    def _sound(self, wave: np.ndarray, rate: int) -> dict[str, Any]:
        from mmllm.blocks.sound import resample

        mono = wave.astype(np.float32)
        mono = mono.mean(int(np.argmin(mono.shape))) if mono.ndim == 2 else mono
        return {"type": "audio", "audio": resample(mono, rate, self.decoder.encoder.sampling_rate)}

    # Requests.

    def turn(self, text: str, media: Any) -> list[dict[str, Any]]:
        """One user turn: the media first, then the words without lmms-eval's placeholders."""
        for mark in PLACEHOLDERS:
            text = text.replace(mark, "")
        return [{"role": "user", "content": [*self.parts(media), {"type": "text", "text": text.strip()}]}]

    def simple(self, request: Any, documents: Documents) -> list[dict[str, Any]]:
        """The conversation of a request (ctx, settings or target, doc_to_visual, doc_id, task, split).

        Requests of two parts (ctx, target), with which lmms-eval asks for the likelihood of an answer alone, show
        nothing.
        """
        if len(request.args) == 2:
            return self.turn(request.args[0], None)
        text, _, doc_to_visual, number, task, split = request.args
        return self.turn(text, doc_to_visual(documents[task][split][number]))

    def chat(self, request: Any, documents: Documents) -> list[dict[str, Any]]:
        """The conversation of a request (ctx, doc_to_messages, settings, doc_id, task, split)."""
        _, doc_to_messages, _, number, task, split = request.args
        out = []
        for message in doc_to_messages(documents[task][split][number]):
            content = message["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            out.append({"role": message["role"], "content": [p for part in parts for p in self._part(part)]})
        return out

    def _part(self, part: Mapping[str, Any]) -> list[dict[str, Any]]:
        return [dict(part)] if part["type"] == "text" else self.parts(part.get("url", part.get(part["type"])))

    def target(self, request: Any, documents: Documents) -> str:
        """The answer of a likelihood request; tasks give a string or a function of the document."""
        told = request.args[1]
        if not callable(told):
            return str(told)
        _, _, _, number, task, split = request.args
        return str(told(documents[task][split][number]))

    def rounds(self, requests: Sequence[Any], documents: Documents) -> list[list[str]]:
        """Answers of all rounds of multi-round requests; those still going on are asked together.

        A request is (ctx, settings, doc_to_visual, doc_to_text, doc_id, task, split); from the second round on
        ``doc_to_text`` gives (media, text, stop, answers so far, notes for the next round).
        """
        said: list[list[str]] = [[] for _ in requests]
        notes: list[Any] = [None] * len(requests)
        going, number = list(range(len(requests))), 0
        while going:
            turns, active = [], []
            for i in going:
                text, _, doc_to_visual, doc_to_text, doc, task, split = requests[i].args
                document = documents[task][split][doc]
                media = doc_to_visual(document) if number == 0 else None
                if number > 0:
                    media, text, stop, kept, notes[i] = doc_to_text(
                        document, previous_output=list(said[i]), round_idx=number, previous_round_info=notes[i]
                    )
                    if stop:
                        said[i] = [str(x) for x in kept] if kept else said[i]
                        continue
                turns.append(self.turn(text, media))
                active.append(i)
            for i, answer in zip(active, self.generate(turns, [requests[i].args[1] for i in active])):
                said[i].append(answer)
            going, number = active, number + 1
        return said


def _key(messages: Sequence[Mapping[str, Any]]) -> str:
    """Equal for conversations with the same words and the same objects or paths as media."""
    parts = [(m["role"], *((p["type"], p.get("text") or p.get("path") or _content(p)) for p in m["content"]))
             for m in messages]  # fmt: skip
    return repr(parts)


def _content(part: Mapping[str, Any]) -> int:
    held = part.get("image") if part["type"] == "image" else part.get("audio")
    raw = held.tobytes() if held is not None and hasattr(held, "tobytes") else b""
    return zlib.crc32(raw)


def world() -> tuple[int, int]:
    """(rank, number of processes) as the launcher set them."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
