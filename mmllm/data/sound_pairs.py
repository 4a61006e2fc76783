"""Two recordings as one sound, one after the other or both at once, with a text that says which (a data recipe)."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmllm.contracts import DataRecipe
from mmllm.data.blob import Blob, media_name, media_stamp
from mmllm.data.captions import captions_of
from mmllm.data.media import load_audio
from mmllm.errors import UserError, unknown
from mmllm.registry import register

RATE = 16_000
# kind -> how its sound is made, and its texts; a is the pair's first sound and b its second.
KINDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "single": ("first", ("{a}",)),
    "both": ("forward", ("{a} and {b}", "{b} and {a}")),
    "forward": ("forward", ("{a} before {b}", "{b} after {a}")),
    "reversed": ("reversed", ("{b} before {a}", "{a} after {b}")),
    "overlay": ("overlay", ("{a} while {b}", "{b} while {a}")),
}


@dataclass(frozen=True)
class PairedSound(Blob):
    """Two recordings as one WAV, made when it is read.

    Attributes:
        how: ``first`` (alone), ``forward`` (first, then second), ``reversed`` or ``overlay`` (both from the start).
        gap: silence between them, in seconds.
    """

    first: Any
    second: Any
    how: str
    gap: float = 0.1

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"{media_name(self.first)} and {media_name(self.second)}, {self.how}"

    def wave(self) -> np.ndarray:
        """Mono float32 [T] at 16 kHz."""
        if self.how == "first":
            return load_audio(self.first, RATE)
        parts = [load_audio(m, RATE) for m in (self.first, self.second)]
        if self.how == "overlay":
            longest = max(map(len, parts))
            return np.stack([np.pad(p, (0, longest - len(p))) for p in parts]).mean(0)
        parts = parts if self.how == "forward" else parts[::-1]
        return np.concatenate([parts[0], np.zeros(round(self.gap * RATE), np.float32), parts[1]])

    def read(self) -> bytes:
        import soundfile

        out = io.BytesIO()
        soundfile.write(out, self.wave(), RATE, format="WAV", subtype="PCM_16")
        return out.getvalue()

    def stamp(self) -> str:
        return f"{media_stamp([self.first, self.second])} {self.how} {self.gap}"


def texts_of_pair(kind: str, a: str, b: str) -> list[str]:
    """The texts of one kind of a pair of names."""
    return [text.format(a=a, b=b) for text in KINDS[kind][1]]


@register("data_recipe", "sound_pairs")
class SoundPairs(DataRecipe):
    """Pairs of recordings of different names, each pair in all ``kinds`` from the same two recordings.

    A record has the kind in ``meta.kind``, the two names in ``meta.first`` and ``meta.second``, its pair as ``group``,
    and as label what is heard: ``cat, dog`` is ``dog, cat`` reversed, and ``cat + dog`` is both at once.

    Args:
        kinds: of ``single`` (the first alone), ``both`` (one after the other, named without order), ``forward``,
            ``reversed`` (the second first) and ``overlay``.
        count: pairs.
        names: which of the names, or how many of them in the order of the alphabet; None: all.
        gap: silence between two sounds, in seconds.
        seed: of the draws.

    Raises:
        UserError: an unknown kind, or fewer than two names.
    """

    def __init__(
        self,
        kinds: Sequence[str] = ("forward", "reversed"),
        count: int = 500,
        names: int | Sequence[str] | None = None,
        gap: float = 0.1,
        seed: int = 0,
    ):
        for kind in kinds:
            if kind not in KINDS:
                raise unknown("kind", kind, KINDS, "data recipe 'sound_pairs'")
        if count < 1 or gap < 0:
            raise UserError("count must be at least 1, and gap not below 0", "data recipe 'sound_pairs'")
        self.kinds, self.count, self.names, self.gap, self.seed = list(kinds), count, names, gap, seed

    def apply(self, records: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        held: dict[str, list[Any]] = {}
        for record in records:
            captions = captions_of(record)
            if record.get("audio") and captions:
                held.setdefault(captions[0][1], []).append(record["audio"])
        if isinstance(self.names, int | None):
            names = sorted(held)[: self.names]
        else:
            names = [n for n in self.names if n in held]
        if len(names) < 2:
            raise UserError("pairs need sounds of two different names", "data recipe 'sound_pairs'")
        rng = np.random.default_rng(self.seed)
        for number in range(self.count):
            a, b = (names[i] for i in rng.choice(len(names), 2, replace=False))
            first, second = (held[n][rng.integers(len(held[n]))] for n in (a, b))
            for kind in self.kinds:
                yield {
                    "id": f"pair-{number}-{kind}",
                    "audio": PairedSound(first, second, KINDS[kind][0], self.gap),
                    "text": texts_of_pair(kind, a, b),
                    "label": _heard(kind, a, b),
                    "group": f"pair-{number}",
                    "meta": {"kind": kind, "first": a, "second": b},
                }


def _heard(kind: str, a: str, b: str) -> str:
    if kind == "single":
        return a
    if kind in ("both", "overlay"):
        return (" and " if kind == "both" else " + ").join(sorted((a, b)))
    return f"{a}, {b}" if kind == "forward" else f"{b}, {a}"
