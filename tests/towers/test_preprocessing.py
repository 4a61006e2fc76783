"""The picture and sound front ends: invariances that the models rely on, and rejection of wrong rates."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from mmllm.towers import MMLLMAudioFeatureExtractor, MMLLMImageProcessor, image_inputs, resized
from mmllm.towers.audio_features import mel_filters
from mmllm.towers.image_processing import to_rgb


def test_pixels_are_normalised_and_whole_picture_is_kept():
    picture = np.zeros((30, 60, 3), np.uint8)
    picture[:, 30:] = 255
    x = MMLLMImageProcessor(image_size=8)(Image.fromarray(picture), return_tensors="np")["pixel_values"]
    assert x.shape == (1, 3, 8, 8)
    np.testing.assert_allclose(x[0, :, :, 0], -127 / 128, atol=1e-6)
    np.testing.assert_allclose(x[0, :, :, 7], 1.0, atol=1e-6)


def test_transparency_goes_on_white():
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    x = MMLLMImageProcessor(image_size=8)(clear, return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(x, 1.0, atol=1e-6)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_pixels_are_the_formula_whether_the_picture_was_resized_before_or_not(mode):
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (20, 30, 4), dtype=np.uint8), "RGBA").convert(mode)
    mean, std = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
    processor = MMLLMImageProcessor(image_size=8, image_mean=mean, image_std=std, resample="bicubic")
    ready = resized(processor, picture)
    assert ready.dtype == np.uint8 and ready.shape == (3, 8, 8)
    x = image_inputs(processor, [picture, ready])["pixel_values"].numpy()
    squashed = to_rgb(picture).resize((8, 8), Image.Resampling.BICUBIC)
    expected = (np.asarray(squashed) / 255.0 - mean) / std
    np.testing.assert_allclose(x, np.stack([expected.transpose(2, 0, 1)] * 2), atol=1e-5)


@pytest.mark.parametrize("length", [0, 1, 700, 9000, 30700, 50000])
@pytest.mark.parametrize("centre", [True, False])
def test_log_mel_is_that_of_all_frames_of_the_padded_window(length, centre):
    extractor = MMLLMAudioFeatureExtractor(centre=centre)
    hop, frames, n = 240, 128, 512
    wave = np.random.default_rng(length).uniform(-1, 1, length).astype(np.float32)
    wave[[0, -1] if length else []] = 1.0  # nothing is trimmed, the peak is 1
    window = np.zeros(frames * hop, np.float32)
    kept = wave[: frames * hop]
    start = (len(window) - len(kept)) // 2 if centre else 0
    window[start : start + len(kept)] = kept
    around = np.pad(window, (n - hop) // 2)  # frame k is centred on the middle of its hop
    taper = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n) / n)
    power = np.abs(np.fft.rfft([around[k * hop : k * hop + n] * taper for k in range(frames)])) ** 2
    expected = np.log(mel_filters(48, n, 16000, 60.0, 8000.0) @ power.T + 1e-5)
    features, mask = extractor.log_mel(wave)
    assert features.dtype == np.float32 and mask.sum() == -(-(start + len(kept)) // hop) - start // hop
    np.testing.assert_allclose(features, expected, atol=1e-3)


def test_log_mel_ignores_level_and_surrounding_silence():
    extractor = MMLLMAudioFeatureExtractor()
    t = np.arange(8000) / 16000
    tone = (np.sin(2 * np.pi * 1000 * t) * np.hanning(8000)).astype(np.float32)
    plain, mask = extractor.log_mel(tone)
    padded, mask2 = extractor.log_mel(np.concatenate([np.zeros(3000), 0.1 * tone, np.zeros(5000)]).astype(np.float32))
    assert plain.shape == (48, extractor.num_frames) and mask.sum() < len(mask)
    np.testing.assert_allclose(plain, padded, atol=1e-3)
    assert (mask == mask2).all()
    # The loudest band is the one whose triangle holds 1000 Hz.
    bank = mel_filters(48, 512, 16000, 60.0, 8000.0)
    assert plain.mean(1).argmax() == bank[:, round(1000 / 16000 * 512)].argmax()


def test_silence_and_long_sounds_are_finite_and_of_fixed_length():
    extractor = MMLLMAudioFeatureExtractor()
    out = extractor([np.zeros(100, np.float32), np.random.default_rng(0).normal(size=80000)], sampling_rate=16000)
    assert np.isfinite(out["input_features"]).all() and out["input_features"].shape == (2, 48, extractor.num_frames)


def test_wrong_sampling_rate():
    with pytest.raises(ValueError, match="16000"):
        MMLLMAudioFeatureExtractor()(np.zeros(100), sampling_rate=44100)
