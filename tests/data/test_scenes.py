"""Scenes are deterministic per index, and their boxes and masks are exact."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from mmllm.data.backgrounds import KINDS, background
from mmllm.data.scenes import Composer, SceneConfig, cooccurrence, draw_concepts, render_thing, tight_box
from mmllm.data.tiles import Tile, centre

COLOURS = {
    "disc": (255, 0, 0),
    "square": (0, 255, 0),
    "bar": (0, 0, 255),
    "ring": (255, 255, 0),
    "cross": (0, 255, 255),
}
BLOCKS = {"disc": "a", "square": "a", "bar": "b", "ring": "b", "cross": "b"}


def picture(tile: Tile) -> Image.Image:
    """A one-coloured shape, so that its pixels can be found again in a scene."""
    image = Image.new("RGBA", (128, 128), (255, 255, 255, 0))
    pen = ImageDraw.Draw(image)
    colour = (*COLOURS[tile.label], 255)
    if tile.label in ("disc", "ring"):
        pen.ellipse((4, 4, 123, 123), fill=colour)
    else:
        pen.rectangle((0, 30, 127, 97) if tile.label == "bar" else (0, 0, 127, 127), fill=colour)
    return image


def composer(**settings: Any) -> Composer:
    pools = {c: [Tile(f"v/{c}", "v", c, c, BLOCKS[c], "s", "")] for c in COLOURS}
    return Composer(pools, BLOCKS, picture, SceneConfig(**settings))


@pytest.mark.parametrize("augment", [False, True])
def test_a_scene_depends_on_its_seed_alone(augment: bool) -> None:
    one, other = composer(augment=augment), composer(augment=augment)
    forward = [one.scene(3, 0, i) for i in range(12)]
    backward = [other.scene(3, 0, i) for i in reversed(range(12))][::-1]
    for a, b in zip(forward, backward):
        assert np.array_equal(a.image, b.image)
        assert a.boxes() == b.boxes()
    assert len({a.image.tobytes() for a in forward}) == 12
    assert not np.array_equal(forward[0].image, one.scene(4, 0, 0).image)


def test_boxes_and_masks_are_exact() -> None:
    made = composer()
    seen = 0
    for i in range(40):
        scene = made.scene(1, i)
        assert 1 <= len(scene.things) <= 3
        assert len({t.label for t in scene.things}) == len(scene.things)
        covered = np.zeros(scene.image.shape[:2], int)
        for t in scene.things:
            inside = (np.abs(scene.image.astype(int) - COLOURS[t.label]).max(-1) < 3) & t.mask
            assert inside.sum() > 0.9 * t.mask.sum()  # the mask lies on the thing's own pixels
            assert tight_box(t.mask) == t.xyxy
            assert 0 <= t.xyxy[0] < t.xyxy[2] <= 1 and 0 <= t.xyxy[1] < t.xyxy[3] <= 1
            assert 0.25 < max(t.xyxy[2] - t.xyxy[0], t.xyxy[3] - t.xyxy[1]) < 0.57
            covered += t.mask
            seen += 1
        assert covered.max() <= 1
    assert seen > 60


def test_tight_box_closed_form() -> None:
    mask = np.zeros((10, 20), bool)
    mask[2:5, 4:10] = True
    assert tight_box(mask) == [0.2, 0.2, 0.5, 0.5]
    assert tight_box(np.zeros((4, 4), bool)) == [0.0] * 4


def test_cooccurrence_follows_beta() -> None:
    blocks = ["a"] * 5 + ["b"] * 5

    def same_block(beta: float) -> float:
        weights = cooccurrence(blocks, beta)
        pairs = [draw_concepts(np.random.default_rng(i), 2, weights) for i in range(3000)]
        assert all(a != b for a, b in pairs)
        return float(np.mean([(a < 5) == (b < 5) for a, b in pairs]))

    assert abs(same_block(0.0) - 4 / 9) < 0.03
    e = np.exp(2.0)
    assert abs(same_block(2.0) - 4 * e / (4 * e + 5)) < 0.03


def test_no_mirror_where_it_is_forbidden() -> None:
    half = Image.new("RGBA", (64, 64), (255, 0, 0, 255))
    half.paste((0, 0, 255, 255), (32, 0, 64, 64))
    firsts = {
        flip: {render_thing(np.random.default_rng(i), half, 40, flip, False).getpixel((2, 20)) for i in range(30)}
        for flip in (True, False)
    }
    assert firsts[False] == {(255, 0, 0, 255)}
    assert len(firsts[True]) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_backgrounds(kind: str) -> None:
    made = background(np.random.default_rng(5), 64, (kind,))
    assert made.shape == (64, 64, 3) and made.dtype == np.uint8
    assert np.array_equal(made, background(np.random.default_rng(5), 64, (kind,)))


def test_tiles_are_trimmed_centred_and_white_underneath() -> None:
    image = Image.new("RGBA", (100, 60), (0, 0, 0, 0))
    image.paste((10, 200, 30, 255), (20, 10, 60, 30))
    tile = np.asarray(centre(image, 128))
    opaque = tile[..., 3] > 127
    assert tight_box(opaque) == [0.0, 0.25, 1.0, 0.75]
    assert (tile[tile[..., 3] == 0][:, :3] == 255).all()
    with pytest.raises(ValueError, match="nothing visible"):
        centre(Image.new("RGBA", (5, 5), (9, 9, 9, 0)), 128)
