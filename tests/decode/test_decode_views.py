"""Media operations: the noise schedule in figures, involutions, seeds, sizes."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops

from mmllm.decode.ops import op
from mmllm.decode.presets import RITUAL_TRANSFORMS
from mmllm.decode.views import (
    alphas_cumprod,
    change_picture,
    change_sound,
    change_tensors,
    diffuse,
    view_seed,
)
from mmllm.errors import UserError


def picture(seed=0, size=(40, 24)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


@pytest.mark.parametrize(("step", "signal", "noise"), [(0, 1.0, 0.0047), (500, 0.863, 0.505), (999, 0.285, 0.9585)])
def test_schedule_has_the_published_coefficients(step, signal, noise):
    a = float(alphas_cumprod()[step])
    assert a**0.5 == pytest.approx(signal, abs=1e-3)
    assert (1 - a) ** 0.5 == pytest.approx(noise, abs=1e-3)


def test_diffuse_keeps_variance_and_follows_its_seed():
    x = torch.randn(3, 200, 200)
    noised = diffuse(x, 500, seed=3)
    assert float(noised.var()) == pytest.approx(1, abs=0.03)
    assert float((noised * x).mean()) == pytest.approx(0.863, abs=0.03)
    assert torch.equal(noised, diffuse(x, 500, seed=3))
    assert not torch.equal(noised, diffuse(x, 500, seed=4))
    torch.testing.assert_close(diffuse(x, 0, seed=3), x, atol=0.05, rtol=0)


@pytest.mark.parametrize("name", ["hflip", "vflip"])
def test_flips_undo_themselves(name):
    image = picture()
    once = change_picture(op(name), image, 0)
    assert ImageChops.difference(once, image).getbbox() is not None
    assert ImageChops.difference(change_picture(op(name), once, 0), image).getbbox() is None


@pytest.mark.parametrize("name", [*RITUAL_TRANSFORMS, "random"])
def test_transforms_keep_the_size_and_follow_their_seed(name):
    image = picture()
    changed = change_picture(op(name), image, 5)
    assert changed.size == image.size and changed.mode == "RGB"
    assert ImageChops.difference(changed, image).getbbox() is not None
    assert changed.tobytes() == change_picture(op(name), image, 5).tobytes()


def test_seeds_differ_by_request_view_and_place():
    seeds = {view_seed(r, v, p) for r in range(5) for v in range(3) for p in range(3)}
    assert len(seeds) == 45


@pytest.mark.parametrize(
    ("name", "args"),
    [("rotate", {"degrees": 0}), ("blur", {"sigma": 0}), ("jitter", {"strength": 0}), ("crop", {"smallest": 1}),
     ("patch_mask", {"ratio": 0})],
)  # fmt: skip
def test_operations_of_no_strength_change_nothing(name, args):
    image = picture()
    assert ImageChops.difference(change_picture(op(name, **args), image, 3), image).getbbox() is None


def test_a_blank_picture_has_no_variance_and_the_mean_colour():
    image = picture()
    blank = np.asarray(change_picture(op("blank"), image, 0))
    assert blank.std(axis=(0, 1)).max() == 0
    assert np.abs(blank[0, 0] - np.asarray(image).mean((0, 1))).max() <= 0.51
    assert np.asarray(change_picture(op("blank", fill="black"), image, 0)).max() == 0


def test_shuffled_tiles_are_the_same_tiles():
    image = Image.fromarray(np.arange(48 * 48 * 3, dtype=np.uint32).reshape(48, 48, 3).astype(np.uint8))

    def tiles(x):
        a = np.asarray(x)
        return sorted(a[r : r + 12, c : c + 12].tobytes() for r in range(0, 48, 12) for c in range(0, 48, 12))

    changed = change_picture(op("patch_shuffle", grid=4), image, 1)
    assert tiles(changed) == tiles(image) and changed.tobytes() != image.tobytes()
    half = np.asarray(change_picture(op("patch_mask", grid=4, ratio=0.5), image, 1))
    hidden = [half[r : r + 12, c : c + 12].std((0, 1)).max() == 0 for r in range(0, 48, 12) for c in range(0, 48, 12)]
    assert sum(hidden) == 8


def test_sounds():
    wave = np.random.default_rng(0).standard_normal(4000).astype("f")
    back = change_sound(op("time_reverse"), wave, 0)
    assert np.array_equal(change_sound(op("time_reverse"), back, 0), wave) and not np.array_equal(back, wave)
    assert not change_sound(op("silence"), wave, 0).any() and not change_sound(op("blank"), wave, 0).any()
    noisy = change_sound(op("noise", snr=10), wave, 4)
    assert 10 * np.log10(np.mean(wave**2) / np.mean((noisy - wave) ** 2)) == pytest.approx(10, abs=0.3)
    assert np.array_equal(noisy, change_sound(op("noise", snr=10), wave, 4))
    assert np.array_equal(np.sort(change_sound(op("patch_shuffle"), wave, 2)), np.sort(wave))


def test_processed_pixels_take_the_operations_that_need_no_picture():
    x = {"pixel_values": torch.randn(1, 3, 8, 8)}
    for name in ("hflip", "vflip"):
        once = change_tensors(op(name), x, 0)
        assert torch.equal(change_tensors(op(name), once, 0)["pixel_values"], x["pixel_values"])
    blank = change_tensors(op("blank"), x, 0)["pixel_values"]
    torch.testing.assert_close(blank.mean((-1, -2)), x["pixel_values"].mean((-1, -2)))
    assert float(blank.var((-1, -2)).max()) < 1e-10
    with pytest.raises(UserError, match="picture itself"):
        change_tensors(op("jitter"), x, 0)
