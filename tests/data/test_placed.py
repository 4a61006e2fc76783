"""Things in a known size."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from mmllm.data.media import load_image
from mmllm.data.placed import Placed
from mmllm.errors import UserError


def test_the_label_is_the_size_that_is_seen(tmp_path):
    Image.new("RGBA", (30, 30), (200, 0, 0, 255)).save(tmp_path / "red.png")
    records = [{"id": str(i), "image": str(tmp_path / "red.png"), "meta": {"vendor": "x"}} for i in range(8)]
    made = list(Placed(side=64, sizes=(0.25, 0.9), steps=64, seed=1).apply(iter([*records, {"id": "none"}])))
    again = list(Placed(side=64, sizes=(0.25, 0.9), steps=64, seed=1).apply(iter(records)))
    assert len(made) == 8 and made[0]["meta"]["vendor"] == "x"
    for one, other in zip(made, again):
        red = np.asarray(load_image(one["image"]))[..., 1] == 0
        assert red.sum() == one["meta"]["size"] ** 2 and 16 <= one["meta"]["size"] <= 58
        assert one["image"].stamp() == other["image"].stamp() and one["image"].read() == other["image"].read()
    assert len({r["image"].stamp() for r in made}) == 8


def test_mistakes_are_named():
    with pytest.raises(UserError, match="two shares of the canvas"):
        Placed(sizes=(0.5, 0.2))
