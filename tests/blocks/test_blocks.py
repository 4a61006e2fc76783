"""Blocks: contrast with soft targets, pooling under a mask, and augmentations that repeat exactly."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from mmllm.blocks.augment import augment_log_mel, jitter_picture, place_cutout
from mmllm.blocks.contrast import sigmoid_contrast, softmax_contrast
from mmllm.blocks.pooling import masked_mean


def test_softmax_contrast_spreads_the_target_over_all_positives():
    torch.manual_seed(0)
    logits = torch.randn(3, 5)
    positive = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 0, 0]]).bool()
    target = positive / positive.sum(-1, keepdim=True).clamp(min=1)
    expected = -(target * logits.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(softmax_contrast(logits, positive), expected)
    assert softmax_contrast(logits, positive)[2] == 0


def test_softmax_contrast_survives_large_logits_in_half_precision():
    logits = torch.tensor([[6e4, -6e4], [-6e4, 6e4]], dtype=torch.float16)
    assert torch.equal(softmax_contrast(logits), torch.zeros(2))


def test_sigmoid_contrast_falls_when_pairs_are_right():
    right = 10 * torch.eye(3) - 5
    assert (sigmoid_contrast(right) < sigmoid_contrast(-right)).all()


def test_masked_mean_ignores_what_is_masked():
    tokens = torch.tensor([[[1.0], [3.0], [100.0]]])
    assert masked_mean(tokens, torch.tensor([[True, True, False]])).item() == 2
    assert masked_mean(tokens, torch.zeros(1, 3, dtype=torch.bool)).item() == 0


def cutout():
    picture = np.zeros((20, 40, 4), np.uint8)
    picture[2:18, 2:38] = (200, 30, 30, 255)
    return Image.fromarray(picture)


def test_plain_cutout_is_centred_on_white():
    canvas = np.asarray(place_cutout(cutout(), 64))
    assert canvas.shape == (64, 64, 3) and (canvas[0] == 255).all() and (canvas[-1] == 255).all()
    assert tuple(canvas[32, 32]) == (200, 30, 30)
    np.testing.assert_array_equal(canvas, canvas[:, ::-1])


def test_random_cutouts_repeat_with_the_generator_and_differ_without():
    views = [np.asarray(place_cutout(cutout(), 64, np.random.default_rng(k))) for k in (1, 1, 2)]
    np.testing.assert_array_equal(views[0], views[1])
    assert (views[0] != views[2]).any()


def test_jitter_keeps_size_and_mode():
    for k in range(10):
        out = jitter_picture(place_cutout(cutout(), 32), np.random.default_rng(k))
        assert out.size == (32, 32) and out.mode == "RGB"


def test_log_mel_augmentation_repeats_and_keeps_shape_and_scale():
    x = torch.randn(3, 48, 128) * 2 - 5
    one, two = (augment_log_mel(x, torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(one, two) and one.shape == x.shape and torch.isfinite(one).all()
    other = augment_log_mel(x, torch.Generator().manual_seed(8))
    assert not torch.equal(one, other) and other.max() < x.max() + 10
