"""Spoken names: eSpeak NG through its library (no apt) and SVOX Pico, in fixed voices, as trimmed 16 kHz PCM files."""

from __future__ import annotations

import ctypes
import functools
import re
import wave
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mmllm.data import pico
from mmllm.data.media import load_audio, resample
from mmllm.errors import UserError

SAMPLE_RATE = 16_000
MAX_SECONDS = 1.9
# espeak_PARAMETER numbers and flags of speak_lib.h
_RATE, _PITCH = 1, 3
_SYNCHRONOUS, _CHARS_UTF8 = 2, 1


class _Espeak:
    """The loaded library; it is a process-wide singleton by its own design."""

    def __init__(self) -> None:
        try:
            import espeakng_loader
        except ImportError:
            raise UserError("espeakng-loader is not installed", do="pip install espeakng-loader") from None
        self.lib = ctypes.CDLL(espeakng_loader.get_library_path())
        data = str(espeakng_loader.get_data_path()).encode()
        self.rate = self.lib.espeak_Initialize(_SYNCHRONOUS, 0, data, 0)
        if self.rate <= 0:
            raise UserError("eSpeak NG did not start", do="reinstall espeakng-loader")
        # Breath and flutter are random: seeded, the n-th clip of a fresh process is always the same (not that
        # of a process that has spoken before, so the builder speaks each part of its list in a process of its own).
        self.lib.espeak_ng_SetRandSeed(ctypes.c_long(7))
        self.pieces: list[np.ndarray] = []
        kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
        self.callback = kind(self._collect)  # kept: the library holds only the pointer
        self.lib.espeak_SetSynthCallback(self.callback)

    def _collect(self, samples, n: int, _events) -> int:
        if n > 0 and samples:
            self.pieces.append(np.ctypeslib.as_array(samples, (n,)).copy())
        return 0

    def say(self, text: str, voice: str, words_per_minute: int, pitch: int) -> np.ndarray:
        self.pieces.clear()
        if self.lib.espeak_SetVoiceByName(voice.encode()) != 0:
            raise UserError(f"eSpeak NG has no voice '{voice}'", do="see the recipe's voices")
        self.lib.espeak_SetParameter(_RATE, words_per_minute, 0)
        self.lib.espeak_SetParameter(_PITCH, pitch, 0)
        raw = text.encode() + b"\0"
        self.lib.espeak_Synth(raw, len(raw), 0, 1, 0, _CHARS_UTF8, None, None)
        self.lib.espeak_Synchronize()
        return np.concatenate(self.pieces) if self.pieces else np.zeros(0, np.int16)


@functools.cache
def _espeak() -> _Espeak:
    return _Espeak()


def trim(samples: np.ndarray, threshold: float = 0.02) -> np.ndarray:
    """Peak to 0.9, silence (below ``threshold`` of the peak) cut at both ends, at most MAX_SECONDS; [T] float32."""
    peak = float(np.abs(samples).max()) if len(samples) else 0.0
    if peak <= 0:
        return np.zeros(0, np.float32)
    loud = np.flatnonzero(np.abs(samples) > threshold * peak)
    cut = samples[max(0, loud[0] - 160) : loud[-1] + 161]
    return (cut * (0.9 / peak)).astype(np.float32)[: int(MAX_SECONDS * SAMPLE_RATE)]


def synthesise(text: str, voice: str = "en-us", words_per_minute: int = 170, pitch: int = 50) -> np.ndarray:
    """Speech, [T] float32 at 16 kHz, trimmed.

    Args:
        voice: an eSpeak NG voice, with a variant if wanted ("en-us+f3"), or one of Pico's ("pico:en-US").
        pitch: 0..99.

    Raises:
        UserError: no such voice, or the library is missing.
    """
    if voice.startswith(pico.PREFIX):
        return trim(pico.say(text, voice, words_per_minute, pitch))
    engine = _espeak()
    return trim(
        resample(engine.say(text, voice, words_per_minute, pitch).astype(np.float32) / 32768, engine.rate, SAMPLE_RATE)
    )


def read_recording(path: Path) -> np.ndarray:
    """A recording as [T] float32 at 16 kHz, mixed down and trimmed; raises UserError when it cannot be read."""
    return trim(load_audio(path, SAMPLE_RATE))


def write_wav(path: Path, samples: np.ndarray) -> None:
    """[T] float32 in -1..1 -> 16 kHz mono PCM16."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as f:
        f.setnchannels(1)
        f.setsampwidth(2)
        f.setframerate(SAMPLE_RATE)
        f.writeframes((np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes())


def slug(name: str) -> str:
    """A file name for a spoken name: "hot dog" -> "hot-dog"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "x"


def speak_names(
    folder: Path,
    names: Sequence[tuple[int, str]],
    voices: Sequence[str],
    seed: int,
    vary: bool,
    per_name: int | None = None,
    every: Sequence[str] = (),
) -> list[tuple[str, str, str]]:
    """Speaks names into ``folder/audio/<voice>/<name>.wav``, each in ``per_name`` voices drawn for it (None: all).

    Args:
        names: (number, name); the number, not the position in this call, seeds the draws of speed, pitch and article.
        every: further voices, in which every name is spoken.
        vary: draw speed, pitch and a leading article per clip; otherwise 170 words a minute, pitch 50, the bare name.

    Returns:
        (name, voice, path relative to ``folder``) of every clip that is not empty.
    """
    made = []
    for number, name in names:
        drawn = np.random.default_rng((seed, 78, number)).permutation(len(voices))[:per_name]
        for v in [*sorted(int(i) for i in drawn), *range(len(voices), len(voices) + len(every))]:
            voice = [*voices, *every][v]
            text, speed, pitch = name, 170, 50
            if vary:
                rng = np.random.default_rng((seed, 77, number, v))
                text = ("", "a ", "the ", "")[int(rng.integers(4))] + name
                speed, pitch = int(rng.integers(120, 231)), int(rng.integers(20, 86))
            samples = synthesise(text, voice, speed, pitch)
            if len(samples) < SAMPLE_RATE // 20:
                continue
            path = Path("audio") / re.sub(r"[+:]", "_", voice) / f"{slug(name)}.wav"
            write_wav(folder / path, samples)
            made.append((name, voice, path.as_posix()))
    return made
