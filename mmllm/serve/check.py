"""Asks a served model and our own greedy decoding the same questions and compares them token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from mmllm.serve.client import SAMPLING_RATE, chat_completion
from mmllm.serve.folder import modalities, read_config
from mmllm.serve.launch import Server


@dataclass
class Case:
    """One question: chat messages in our form, media as loaded objects."""

    name: str
    messages: list[dict[str, Any]]


@dataclass
class Comparison:
    """What both sides made of a case; token ids without the end token."""

    name: str
    ours: list[int]
    served: list[int]
    our_prompt: list[int] = field(repr=False)
    served_prompt: list[int] = field(repr=False)
    text: str = ""

    @property
    def same(self) -> bool:
        """The same prompt tokens, media places included, and the same answer."""
        return self.ours == self.served and self.our_prompt == self.served_prompt


def sample_picture(seed: int, size: tuple[int, int] = (200, 160)) -> Image.Image:
    """A coloured gradient with a few shapes; each seed another one."""
    rng = np.random.default_rng(seed)
    width, height = size
    corners = rng.integers(0, 256, (2, 2, 3)).astype(np.uint8)
    image = Image.fromarray(corners).resize(size, Image.Resampling.BILINEAR)
    draw = ImageDraw.Draw(image)
    for k in range(4):
        x, y, r = rng.integers(0, width), rng.integers(0, height), rng.integers(15, 50)
        shape = draw.ellipse if k % 2 else draw.rectangle
        shape((int(x - r), int(y - r), int(x + r), int(y + r)), fill=tuple(map(int, rng.integers(0, 256, 3))))
    return image


def sample_sound(seed: int, seconds: float = 0.9) -> np.ndarray:
    """A few gliding tones [T] at 16 kHz, exact in 16-bit PCM; each seed another one."""
    rng = np.random.default_rng(seed)
    t = np.arange(int(seconds * SAMPLING_RATE)) / SAMPLING_RATE
    wave = sum(np.sin(2 * np.pi * rng.uniform(150, 2500) * t * (1 + rng.uniform(-0.3, 0.3) * t)) for _ in range(4))
    envelope = np.sin(np.pi * t / seconds) * (1 + np.sin(2 * np.pi * rng.uniform(2, 9) * t)) / 2
    return (np.round(0.15 * wave * envelope * 32768) / 32768).astype(np.float32)


def sample_cases(media: Sequence[str]) -> list[Case]:
    """Text alone, and for each medium two questions that differ in nothing but the medium; mixtures and pairs."""

    def text(words: str) -> dict[str, Any]:
        return {"type": "text", "text": words}

    def image(seed: int) -> dict[str, Any]:
        return {"type": "image", "image": sample_picture(seed)}

    def audio(seed: int) -> dict[str, Any]:
        return {"type": "audio", "audio": sample_sound(seed, 0.6 + 0.3 * (seed % 3))}

    found = {
        "text": [text("What is a cat?")],
        "image": [image(1), text("What is in the picture?")],
        "image_other": [image(2), text("What is in the picture?")],
        "image_pair": [image(3), text(" and "), image(4), text("Is there a cat in picture 2?")],
        "audio": [audio(1), text("What do you hear?")],
        "audio_other": [audio(2), text("What do you hear?")],
        "image_audio": [image(5), text("Look and listen: "), audio(3), text("What is it?")],
        "audio_image": [audio(4), image(6), text("What is it?")],
    }
    wanted = {name: content for name, content in found.items() if {p["type"] for p in content} - {"text"} <= set(media)}
    return [Case(name, [{"role": "user", "content": content}]) for name, content in wanted.items()]


def compare(server: Server, cases: Sequence[Case] | None = None, max_new_tokens: int = 24) -> list[Comparison]:
    """Greedy answers of the server and of ``mmllm.decode`` in float32 on the same model folder.

    Args:
        server: a running server, started with ``dtype="float32"`` (other formats break ties differently).
        cases: default ``sample_cases``.
    """
    import torch

    from mmllm.decode import Decoder, Request
    from mmllm.model import load_model

    if cases is None:
        cases = sample_cases(modalities(read_config(server.folder)))
    served = [
        chat_completion(
            server.url,
            server.name,
            case.messages,
            max_new_tokens,
            temperature=0,
            repetition_penalty=1.0,
            return_token_ids=True,
        )
        for case in cases
    ]
    model, processor = load_model(server.folder, dtype=torch.float32)
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    decoder = Decoder(model, processor)
    ours = decoder.generate([Request(case.messages, max_new_tokens=max_new_tokens) for case in cases])
    out = []
    for case, answer, result in zip(cases, served, ours):
        choice = answer["choices"][0]
        tokens = list(choice["token_ids"])
        while tokens and tokens[-1] in ends:
            tokens.pop()
        prompt = processor.apply_chat_template(case.messages, tokenize=True, add_generation_prompt=True)["input_ids"]
        out.append(
            Comparison(
                case.name,
                list(result.token_ids),
                tokens,
                prompt[0].tolist(),
                list(answer["prompt_token_ids"]),
                choice["message"]["content"] or "",
            )
        )
    return out


def write_result(path: str | Path, rows: Sequence[Comparison], command: str, start_seconds: float) -> None:
    """The comparison as figures."""
    from mmllm.report.figures import Figure, write_figures

    same = sum(r.same for r in rows) / len(rows)
    figures = [
        Figure(
            "serve_parity",
            same,
            n=len(rows),
            unit="fraction",
            target=1.0,
            verdict="met" if same == 1 else "missed",
            note="cases whose tokens in vLLM equal our own greedy, float32",
        ),
        Figure("serve_start_seconds", start_seconds, better="lower", unit="s"),
    ]
    write_figures(path, command, None, None, None, figures)
