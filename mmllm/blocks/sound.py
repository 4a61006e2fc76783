"""Changes the sampling rate of sounds, for whoever reads them and whoever feeds them to a tower."""

from __future__ import annotations

from math import gcd

import numpy as np


def resample(wave: np.ndarray, rate: int, target: int) -> np.ndarray:
    """wave [T] at ``rate`` Hz -> the same sound at ``target`` Hz, by a polyphase filter."""
    if rate == target:
        return wave.astype(np.float32)
    from scipy.signal import resample_poly

    common = gcd(rate, target)
    return resample_poly(wave, target // common, rate // common).astype(np.float32)
