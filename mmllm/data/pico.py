"""Names spoken by SVOX Pico, whose voices were made from recordings of people; comes with the package py-nanotts."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from mmllm.errors import UserError
from mmllm.malloc import zeroed_memory

PREFIX = "pico:"
SAMPLE_RATE = 16_000
_RATE, _MIDDLE, _SPAN = 130, 52, 100  # words a minute at Pico's speed 1; eSpeak's middle pitch; its steps an octave


@functools.cache
def _engine() -> Any:
    try:
        from py_nanotts import NanoTTS
    except ImportError:
        raise UserError("py-nanotts is not installed", do="pip install py-nanotts") from None
    return NanoTTS()


def say(text: str, voice: str, words_per_minute: int, pitch: int) -> np.ndarray:
    """Speech, [T] float32 at 16 kHz, with the silence around it; the same for the same words and voice.

    Args:
        voice: "pico:en-US" or "pico:en-GB".
        words_per_minute, pitch: as eSpeak's (pitch 0..99), so that both are asked alike.

    Raises:
        UserError: no such voice, or the package is missing.
    """
    name = voice.removeprefix(PREFIX)
    factor = 2 ** ((pitch - _MIDDLE) / _SPAN)
    try:
        with zeroed_memory():  # Pico reads what it never wrote, and then every build is another
            sound = _engine().speak(text, voice=name, speed=words_per_minute / _RATE, pitch=factor)
    except ValueError:
        raise UserError(f"SVOX Pico has no voice '{name}'", do="take pico:en-US or pico:en-GB") from None
    return np.frombuffer(sound, "<i2").astype(np.float32) / 32768
