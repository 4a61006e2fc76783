"""Transforms: boxes stay on what they mark, sounds keep their promises, and a generator repeats every draw."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from mmllm.data.transforms import build_transforms
from mmllm.errors import UserError
from mmllm.registry import names

BOX = [0.5, 0.25, 0.75, 0.75]


def scene():
    """Grey, with a red rectangle where its box says."""
    picture = np.full((80, 120, 3), 128, np.uint8)
    picture[20:60, 60:90] = (255, 0, 0)
    wave = np.sin(np.arange(4000) / 7).astype(np.float32) * 0.5
    return {
        "image": Image.fromarray(picture), "boxes": [{"xyxy": BOX, "text": "red"}], "audio": wave,
        "text": "A red thing stands here. It is grey around it! Is it?",
    }  # fmt: skip


def redness(item):
    """(share of red pixels inside the box, share outside)."""
    red = np.asarray(item["image"])[..., 1] < 64
    height, width = red.shape
    x0, y0, x1, y1 = (np.array(item["boxes"][0]["xyxy"]) * [width, height, width, height]).round().astype(int)
    inside = np.zeros_like(red)
    inside[y0:y1, x0:x1] = True
    return red[inside].mean(), red[~inside].mean()


@pytest.mark.parametrize("spec", [{"type": "random_resized_crop", "scale": [0.3, 1.0]}, {"type": "horizontal_flip"}])
def test_boxes_stay_on_their_things(spec):
    transform, moved = build_transforms([spec]), 0
    for seed in range(40):
        out = transform(scene(), np.random.default_rng(seed))
        if out["boxes"]:
            inside, outside = redness(out)
            assert inside > 0.9 and outside < 0.06, seed
            moved += out["boxes"][0]["xyxy"] != BOX
    assert moved > 10


def test_a_crop_drops_a_box_of_which_little_remains_and_resizes():
    strict = build_transforms([{"type": "random_resized_crop", "size": 32, "scale": [0.1, 0.1], "keep": 0.99}])
    out = [strict(scene(), np.random.default_rng(s)) for s in range(30)]
    assert all(o["image"].size == (32, 32) for o in out)
    assert 0 < sum(not o["boxes"] for o in out)
    assert scene()["boxes"][0]["xyxy"] == BOX


def test_flip_twice_is_the_identity_and_respects_nomirror():
    flip = build_transforms([{"type": "horizontal_flip", "p": 1.0}])
    twice = flip(flip(scene(), np.random.default_rng(0)), np.random.default_rng(0))
    assert np.array_equal(np.asarray(twice["image"]), np.asarray(scene()["image"]))
    np.testing.assert_allclose(twice["boxes"][0]["xyxy"], BOX)
    still = {**scene(), "meta": {"nomirror": True}}
    assert flip(still, np.random.default_rng(0)) is still


def test_waves():
    rng = np.random.default_rng(0)
    item = scene()
    cut = build_transforms([{"type": "wave_crop", "samples": 1000}])(item, rng)["audio"]
    at = np.flatnonzero(np.isclose(item["audio"], cut[0]))
    assert len(cut) == 1000 and any(np.array_equal(item["audio"][a : a + 1000], cut) for a in at)
    padded = build_transforms([{"type": "wave_crop", "samples": 5000}])(item, rng)["audio"]
    assert len(padded) == 5000 and np.isclose(np.square(padded).sum(), np.square(item["audio"]).sum())
    noisy = build_transforms([{"type": "wave_noise", "decibels": [20, 20]}])(item, rng)["audio"]
    noise = np.square(noisy - item["audio"]).mean()
    assert 10 * np.log10(np.square(item["audio"]).mean() / noise) == pytest.approx(20, abs=0.4)
    for seed in range(20):
        loud = build_transforms([{"type": "wave_gain", "decibels": 12}])(item, np.random.default_rng(seed))["audio"]
        assert np.abs(loud).max() <= 1 and np.corrcoef(loud, item["audio"])[0, 1] > 0.9999
        assert 10 ** (-12 / 20) - 1e-6 <= np.abs(loud).max() / 0.5 <= 2.000001
    silent = build_transforms(["wave_noise", "wave_gain"])({"audio": np.zeros(5, np.float32)}, rng)["audio"]
    assert not silent.any()


def test_words():
    words = scene()["text"].split()
    drop = build_transforms([{"type": "word_dropout", "p": 0.3}])
    out = [drop(scene(), np.random.default_rng(s))["text"].split() for s in range(300)]
    it = [iter(words) for _ in out]
    assert all(all(w in rest for w in o) for o, rest in zip(out, it, strict=True))  # in order
    assert np.mean([len(o) for o in out]) == pytest.approx(1 + 0.7 * (len(words) - 1), abs=0.4)
    all_but_one = build_transforms([{"type": "word_dropout", "p": 1.0}])
    assert all_but_one(scene(), np.random.default_rng(0))["text"] in words
    found = {build_transforms(["random_sentence"])(scene(), np.random.default_rng(s))["text"] for s in range(30)}
    assert found == {"A red thing stands here.", "It is grey around it!", "Is it?"}


@pytest.mark.parametrize("name", names("transform"))
def test_every_transform_repeats_with_its_generator_and_leaves_missing_media_alone(name):
    made = build_transforms([{"type": name, **({"samples": 500} if name == "wave_crop" else {})}])
    one, two = (made(scene(), np.random.default_rng(5)) for _ in range(2))
    for key in one:
        assert np.array_equal(np.asarray(one[key]), np.asarray(two[key])), key
    assert made({"id": "x"}, np.random.default_rng(5)) == {"id": "x"}


def test_mistakes():
    with pytest.raises(UserError, match="did you mean 'horizontal_flip'"):
        build_transforms(["horizontl_flip"])
    with pytest.raises(UserError, match="unknown option 'q'"):
        build_transforms([{"type": "horizontal_flip", "q": 1}])
    with pytest.raises(UserError, match="scale must rise"):
        build_transforms([{"type": "random_resized_crop", "scale": [0, 2]}])
