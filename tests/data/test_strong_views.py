"""Strong views: what each change keeps, what it changes, and that its draws repeat."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from PIL import Image

from mmllm.data.strong_views import turned_hue
from mmllm.errors import UserError
from mmllm.registry import make

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))


def changed(spec, item, seed=0):
    return make("transform", spec)(item, np.random.default_rng(seed))


@pytest.mark.parametrize("name", ["colour_distortion", "random_grey", "random_blur"])
def test_pictures(name):
    item = {"image": PICTURE, "boxes": [{"xyxy": [0, 0, 1, 1]}]}
    always, never = ({"type": name, "p": p} for p in (1.0, 0.0))
    made = changed(always, item, 3)
    assert made["image"].size == (8, 8) and made["boxes"] == item["boxes"]
    assert np.any(np.array(made["image"]) != np.array(PICTURE))
    assert np.array_equal(made["image"], changed(always, item, 3)["image"])
    assert changed(never, item)["image"] is PICTURE and changed(always, {"text": "x"}) == {"text": "x"}


def test_grey_and_hue():
    grey = np.array(changed({"type": "random_grey", "p": 1.0}, {"image": PICTURE})["image"])
    assert (grey == grey[..., :1]).all()
    red = Image.new("RGB", (2, 2), (255, 0, 0))
    assert np.array(turned_hue(red, 1 / 3))[0, 0].tolist()[1] > 250  # a third of the circle further lies green
    calm = {"type": "colour_distortion", "brightness": 0, "contrast": 0, "saturation": 0, "hue": 0, "p": 1.0}
    assert np.abs(np.array(changed(calm, {"image": red})["image"]).astype(int) - np.array(red)).max() <= 2


def test_words():
    text = {"text": "a picture of the red cat"}
    assert changed({"type": "drop_stop_words", "p": 1.0}, text)["text"] == "picture red cat"
    assert changed({"type": "drop_stop_words", "p": 1.0}, {"text": "of the"})["text"] == "the"
    for seed in range(5):
        swapped = changed({"type": "swap_words", "p": 1.0}, text, seed)["text"].split()
        assert Counter(swapped) == Counter(text["text"].split())
        assert sum(a != b for a, b in zip(swapped, text["text"].split())) == 2
        shorter = changed({"type": "delete_word", "p": 1.0}, text, seed)["text"].split()
        assert len(shorter) == 5 and not Counter(shorter) - Counter(text["text"].split())
    for name in ("drop_stop_words", "swap_words", "delete_word"):
        assert changed({"type": name, "p": 1.0}, {"text": "cat"}) == {"text": "cat"}
        assert changed({"type": name, "p": 0.0}, text) == text


def test_mistakes_are_named():
    with pytest.raises(UserError, match="p must be within"):
        make("transform", {"type": "swap_words", "p": 2})
    with pytest.raises(UserError, match="out of range"):
        make("transform", {"type": "colour_distortion", "hue": 1})
