"""Media operations: the noise schedule in figures, involutions, seeds, sizes."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops

from mmllm.decode.ops import op
from mmllm.decode.presets import RITUAL_TRANSFORMS
from mmllm.decode.views import alphas_cumprod, change_picture, diffuse, view_seed


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
