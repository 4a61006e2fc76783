"""Spoken names are clean 16 kHz files, and the same in every fresh process."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import wave
from pathlib import Path

import numpy as np
import pytest

from mmllm.data import speech
from mmllm.errors import UserError

SAY = """
import sys
from pathlib import Path
from mmllm.data.speech import speak_names
print(len(speak_names(Path(sys.argv[1]), [(4, "cat"), (9, "hot dog")], ["en-us", "en+f3"], 0, True, None,
                      ["pico:en-US", "pico:en-GB"])))
"""


def test_trim_cuts_silence_and_sets_the_peak() -> None:
    sound = np.zeros(16000, np.float32)
    sound[4000:8000] = 0.1 * np.sin(np.arange(4000) / 5)
    cut = speech.trim(sound)
    assert 4000 <= len(cut) <= 4330
    assert abs(np.abs(cut).max() - 0.9) < 1e-3
    assert len(speech.trim(np.zeros(100, np.float32))) == 0
    assert len(speech.trim(np.ones(100_000, np.float32))) == int(speech.MAX_SECONDS * 16000)


def test_wav_round_trip(tmp_path: Path) -> None:
    samples = np.linspace(-1, 1, 500, dtype=np.float32)
    speech.write_wav(tmp_path / "a" / "x.wav", samples)
    with wave.open(str(tmp_path / "a" / "x.wav")) as f:
        assert (f.getframerate(), f.getnchannels(), f.getsampwidth()) == (16000, 1, 2)
    assert np.abs(speech.read_recording(tmp_path / "a" / "x.wav") - 0.9 * samples).max() < 1e-3


def test_words_and_voices_sound_different() -> None:
    cat, elephant = speech.synthesise("cat"), speech.synthesise("elephant")
    assert 0.15 < len(cat) / 16000 < len(elephant) / 16000 < 1.9
    assert period(speech.synthesise("llama", "en-us", 170, 5)) > 1.2 * period(
        speech.synthesise("llama", "en-us", 170, 95)
    )


def period(sound: np.ndarray) -> int:
    """Length of one vibration of the voice in samples: where the middle of the word is most like itself, shifted."""
    middle = sound[len(sound) // 2 - 1000 : len(sound) // 2 + 1000]
    like = np.correlate(middle, middle, "full")[len(middle) - 1 :]
    return 50 + int(like[50:260].argmax())


def test_unknown_voice() -> None:
    with pytest.raises(UserError, match="no voice 'xx-none'"):
        speech.synthesise("cat", "xx-none")
    with pytest.raises(UserError, match="no voice 'xx-none'; take pico"):
        speech.synthesise("cat", "pico:xx-none")


def test_fresh_processes_say_the_same(tmp_path: Path) -> None:
    sums = []
    for name in ("a", "b"):
        subprocess.run([sys.executable, "-c", SAY, str(tmp_path / name)], check=True, capture_output=True)
        files = sorted((tmp_path / name).rglob("*.wav"))
        assert len(files) == 8
        sums.append([hashlib.sha256(f.read_bytes()).hexdigest() for f in files])
    assert sums[0] == sums[1]
    assert len(set(sums[0])) == 8


def test_each_name_is_spoken_in_some_voices_and_in_every_one_of_the_others(tmp_path: Path) -> None:
    voices, every = ["en-us", "en+f3", "en+m3"], ["pico:en-US"]
    made = speech.speak_names(tmp_path, [(i, n) for i, n in enumerate(["cat", "dog"])], voices, 0, True, 2, every)
    for name in ("cat", "dog"):
        spoken = [voice for said, voice, _ in made if said == name]
        assert len(spoken) == 3 and spoken[-1] == "pico:en-US" and set(spoken[:2]) < set(voices)
    assert all((tmp_path / path).is_file() and ":" not in path for *_, path in made)


def test_pico_speaks_slower_and_higher_when_asked() -> None:
    slow, fast, low, high = (
        speech.synthesise("elephant", "pico:en-US", speed, pitch)
        for speed, pitch in ((120, 50), (220, 50), (170, 5), (170, 95))
    )
    assert len(slow) > 1.5 * len(fast) and period(low) > 1.2 * period(high)


def test_pico_says_the_same_whatever_was_in_memory_before() -> None:
    pico = pytest.importorskip("mmllm.data.pico")
    pytest.importorskip("py_nanotts")
    rng, said, kept = np.random.default_rng(0), [], []
    for turn in range(8):
        blocks = [np.frombuffer(rng.bytes(int(n)), np.uint8).copy() for n in rng.choice([300, 3_000, 90_000], 3_000)]
        kept = blocks[turn % 2 :: 2]  # the others' memory is free again, and full of noise
        del blocks
        said.append([pico.say("the word abacus number two", f"pico:en-{place}", 150, 50) for place in ("US", "GB")])
    assert len(kept) == 1_500
    for again in said[1:]:
        assert all(np.array_equal(x, y) for x, y in zip(said[0], again, strict=True))
