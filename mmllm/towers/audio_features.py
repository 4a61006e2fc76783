"""Sound to log-mel features for our own audio tower, with numpy only, in the form transformers knows."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from transformers.feature_extraction_sequence_utils import SequenceFeatureExtractor
from transformers.feature_extraction_utils import BatchFeature

FLOOR = 1e-5  # power added in each band, which keeps the logarithm finite


@lru_cache
def mel_filters(n_mels: int, n_fft: int, sampling_rate: int, low: float, high: float) -> np.ndarray:
    """Triangular filters [n_mels, n_fft // 2 + 1] on the HTK mel scale, 2595 log10(1 + f / 700)."""
    mel = lambda hz: 2595 * np.log10(1 + hz / 700)  # noqa: E731
    points = 700 * (10 ** (np.linspace(mel(low), mel(high), n_mels + 2) / 2595) - 1)
    freq = np.linspace(0, sampling_rate / 2, n_fft // 2 + 1)
    rising = (freq - points[:-2, None]) / (points[1:-1] - points[:-2])[:, None]
    falling = (points[2:, None] - freq) / (points[2:] - points[1:-1])[:, None]
    return np.clip(np.minimum(rising, falling), 0, None).astype(np.float32)


def trim_silence(wave: np.ndarray, threshold: float = 0.03) -> np.ndarray:
    """Peak-normalises and cuts what lies below ``threshold`` of the peak at both ends; silence stays as it is."""
    peak = float(np.abs(wave).max(initial=0.0))
    if peak < 1e-6:
        return wave
    wave = wave / peak
    loud = np.nonzero(np.abs(wave) > threshold)[0]
    return wave[loud[0] : loud[-1] + 1]


class MMLLMAudioFeatureExtractor(SequenceFeatureExtractor):
    """Log-mel spectrogram of a fixed window: trimmed, peak-normalised, centred or first, cut to ``max_seconds``.

    Args:
        feature_size: mel bands.
        max_seconds: window length; every item gets the same number of frames.
        hop_seconds: step between frames.
        centre: whether a short sound stands in the middle of the window, or at its start.
    """

    model_input_names = ["input_features", "feature_attention_mask"]

    def __init__(
        self,
        feature_size: int = 48,
        sampling_rate: int = 16000,
        padding_value: float = 0.0,
        max_seconds: float = 1.92,
        hop_seconds: float = 0.015,
        n_fft: int = 512,
        low_hz: float = 60.0,
        high_hz: float = 8000.0,
        centre: bool = True,
        **kwargs: Any,
    ):
        super().__init__(feature_size=feature_size, sampling_rate=sampling_rate, padding_value=padding_value, **kwargs)
        self.max_seconds, self.hop_seconds, self.n_fft = max_seconds, hop_seconds, n_fft
        self.low_hz, self.high_hz, self.centre = low_hz, high_hz, centre

    @property
    def num_frames(self) -> int:
        return round(self.max_seconds / self.hop_seconds)

    def log_mel(self, wave: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """wave [T] -> log-mel [F, frames] float32 and mask [frames], True on frames that hold sound."""
        hop, frames = round(self.hop_seconds * self.sampling_rate), self.num_frames
        wave = trim_silence(np.asarray(wave, np.float32))[: frames * hop]
        start = (frames * hop - len(wave)) // 2 if self.centre else 0
        padded = np.zeros((frames - 1) * hop + self.n_fft, np.float32)
        # Frame k is centred on sample k * hop + hop / 2 of the window.
        offset = (self.n_fft - hop) // 2 + start
        take = min(len(wave), len(padded) - offset)
        padded[offset : offset + take] = wave[:take]
        # A word fills a third of the window: the frames that see nothing of it are known.
        first, last = max(0, (offset - self.n_fft) // hop + 1), min(frames, -(-(offset + take) // hop))
        index = np.arange(first, last)[:, None] * hop + np.arange(self.n_fft)
        window = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(self.n_fft) / self.n_fft)).astype(np.float32)
        spectrum = np.fft.rfft(padded[index] * window)
        power = (spectrum.real**2 + spectrum.imag**2).astype(np.float32)
        bank = mel_filters(self.feature_size, self.n_fft, self.sampling_rate, self.low_hz, self.high_hz)
        features = np.full((self.feature_size, frames), np.log(np.float32(FLOOR)), np.float32)
        features[:, first:last] = np.log(bank @ power.T + np.float32(FLOOR))
        mask = np.zeros(frames, bool)
        mask[start // hop : -(-(start + len(wave)) // hop)] = True
        return features, mask

    def __call__(
        self,
        raw_speech: Any = None,
        sampling_rate: int | None = None,
        return_tensors: str | None = None,
        audio: Any = None,
        **_: Any,
    ) -> BatchFeature:
        """One wave [T] or a list of them -> ``input_features`` [B, F, T] and ``feature_attention_mask`` [B, T].

        Raises:
            ValueError: another sampling rate than the extractor's.
        """
        waves = raw_speech if raw_speech is not None else audio
        if sampling_rate is not None and sampling_rate != self.sampling_rate:
            raise ValueError(f"expected sound at {self.sampling_rate} Hz, got {sampling_rate} Hz: resample it first")
        if not isinstance(waves, (list, tuple)) or (len(waves) and np.isscalar(waves[0])):
            waves = [waves]
        both = [self.log_mel(np.asarray(w, np.float32).reshape(-1)) for w in waves]
        data = {
            "input_features": np.stack([x for x, _ in both]),
            "feature_attention_mask": np.stack([m for _, m in both]).astype(np.int64),
        }
        return BatchFeature(data, tensor_type=return_tensors)
