"""The planted world: its probabilities, its backgrounds, twins that differ in B alone, cut-outs that never mix."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest
from PIL import Image, ImageDraw

from mmllm.data.backgrounds import KINDS
from mmllm.data.planted import PlantedComposer, PlantedConfig, Prior, plant, split_tiles
from mmllm.data.scenes import Scene, tight_box
from mmllm.data.tiles import Tile

LABELS = [f"thing{i}" for i in range(12)]
PRIOR = Prior((("thing0", "thing1"), ("thing2", "thing3"), ("thing4", "thing5")), tuple(LABELS[6:]))
SMALL = PlantedConfig(size=32, weak_smallest=0.2, weak_largest=0.25, noise=2.0)


def picture(tile: Tile) -> Image.Image:
    """A disc in a colour of its own."""
    image = Image.new("RGBA", (64, 64), (255, 255, 255, 0))
    hue = 37 * int(tile.label.removeprefix("thing"))
    ImageDraw.Draw(image).ellipse((2, 2, 61, 61), fill=(hue % 256, (hue * 3) % 256, (hue * 7) % 256, 255))
    return image


def composer(config: PlantedConfig = SMALL, augment: bool = False) -> PlantedComposer:
    pools = {x: [Tile(f"v/{x}-{k}", "v", x, x, "c", "s", "") for k in range(3)] for x in LABELS}
    return PlantedComposer(PRIOR, pools, picture, config, augment)


@lru_cache
def natural() -> list[Scene]:
    made = composer()
    return [made.scene(0, i) for i in range(600)]


def within(hits: int, n: int, p: float) -> bool:
    """Four standard deviations of a binomial."""
    return abs(hits - n * p) < 4 * np.sqrt(n * p * (1 - p))


def test_partners_come_as_often_as_planted() -> None:
    scenes = [{t.label for t in s.things} for s in natural()]
    for a, b in PRIOR.pairs:
        beside = [s for s in scenes if a in s]
        alone = [s for s in scenes if a not in s]
        assert within(len(beside), len(scenes), SMALL.anchored / 3)
        assert within(sum(b in s for s in beside), len(beside), SMALL.together)
        assert within(sum(b in s for s in alone), len(alone), SMALL.stray)
    assert within(sum(any(a in s for a, _ in PRIOR.pairs) for s in scenes), len(scenes), SMALL.anchored)
    assert all(s & set(PRIOR.clean) for s in scenes)
    counts = np.array([sum(x in s for s in scenes) for x in PRIOR.clean])
    assert counts.max() < 1.3 * counts.min()  # no clean thing is favoured


def test_a_scene_depends_on_its_seed_alone() -> None:
    one, other = composer(augment=True), composer(augment=True)
    forward = [one.scene(3, 1, i).image for i in range(6)]
    backward = [other.scene(3, 1, i).image for i in reversed(range(6))][::-1]
    assert all(np.array_equal(a, b) for a, b in zip(forward, backward))
    assert len({x.tobytes() for x in forward}) == 6
    assert not np.array_equal(forward[0], one.scene(4, 1, 0).image)


def test_twins_are_equal_outside_b() -> None:
    made = composer()
    for i in range(40):
        twins = made.twins(0, 5, i)
        a, b = PRIOR.pairs[twins.pair]
        shown, hidden = ([t.label for t in s.things] for s in (twins.shown, twins.hidden))
        assert a in hidden and b not in hidden and shown == [*hidden, b]
        assert [t.xyxy for t in twins.shown.things[:-1]] == [t.xyxy for t in twins.hidden.things]
        different = (twins.shown.image != twins.hidden.image).any(-1)
        assert different.any() and not (different & ~twins.differs).any()
        x0, y0, x1, y1 = tight_box(twins.differs)
        bx0, by0, bx1, by1 = twins.shown.things[-1].xyxy
        assert x0 <= bx0 and y0 <= by0 and x1 >= bx1 and y1 >= by1
        assert twins.differs.mean() < 0.15


def test_twins_draw_everything_else_as_natural_scenes_do() -> None:
    made = composer()
    hidden = [{t.label for t in made.twins(1, i).hidden.things} for i in range(300)]
    for k, (a, b) in enumerate(PRIOR.pairs):
        others = [s for s in hidden if a not in s]
        assert within(len(hidden) - len(others), len(hidden), 1 / 3), k
        assert within(sum(b in s for s in others), len(others), SMALL.stray), k


def test_boxes_are_exact_and_partners_are_small() -> None:
    for scene in natural()[:60]:
        covered = np.zeros(scene.image.shape[:2], int)
        for t in scene.things:
            assert tight_box(t.mask) == t.xyxy
            side = max(t.xyxy[2] - t.xyxy[0], t.xyxy[3] - t.xyxy[1])
            weak = t.label in {b for _, b in PRIOR.pairs}
            assert side <= (SMALL.weak_largest if weak else SMALL.largest) + 2 / SMALL.size
            covered += t.mask
        assert covered.max() == 1  # nothing lies on anything


def test_a_partner_is_paler_than_the_same_art_opaque() -> None:
    """Where B is painted, the picture lies between the ground and B's colour, as far as its opacity says."""
    config = PlantedConfig(size=64, noise=0, weak_opacity=0.5, weak_smallest=0.3, weak_largest=0.3)
    full = config.model_copy(update={"weak_opacity": 1.0})
    half, whole = composer(config).twins(0, 1), composer(full).twins(0, 1)
    core = half.shown.things[-1].mask & whole.shown.things[-1].mask
    ground, art, pale = (x.image[core].astype(float) for x in (whole.hidden, whole.shown, half.shown))
    clear = np.abs(art - ground) > 40
    share = (pale - ground)[clear] / (art - ground)[clear]
    assert len(share) > 50 and abs(np.median(share) - 0.5) < 0.03


def test_the_background_follows_the_a_and_swapped_ones_never_do(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []

    def ground(rng: np.random.Generator, size: int, kinds: tuple[str, ...] = KINDS) -> np.ndarray:
        asked.append(kinds)
        return np.zeros((size, size, 3), np.uint8)

    monkeypatch.setattr("mmllm.data.planted.background", ground)
    made = composer()
    kinds = {a: PRIOR.kind(k) for k, (a, _) in enumerate(PRIOR.pairs)}
    tied = total = 0
    for i in range(150):
        anchors = [t.label for t in made.scene(0, i).things if t.label in kinds]
        if anchors:
            total += 1
            tied += asked[-1] == (kinds[anchors[0]],)
        else:
            assert asked[-1] == KINDS
        made.scene(0, i, draw="swapped")
        if anchors:
            assert kinds[anchors[0]] not in asked[-1] and set(asked[-1]) < set(kinds.values())
    assert within(tied, total, SMALL.tied)


def test_pairs_are_disjoint_and_seeded() -> None:
    prior = plant(LABELS, 4, 0)
    ends = [x for pair in prior.pairs for x in pair]
    assert len(set(ends)) == 8 and sorted([*ends, *prior.clean]) == sorted(LABELS)
    assert prior == plant(LABELS, 4, 0) != plant(LABELS, 4, 1)
    with pytest.raises(ValueError, match="too few"):
        plant(LABELS, 6, 0)


@pytest.mark.parametrize("count", [3, 4, 7, 13])
def test_cut_outs_of_the_parts_are_disjoint(count: int) -> None:
    pool = [f"v/{i}" for i in range(count)]
    parts = split_tiles(pool, 0, "cat")
    assert sorted(parts["train"] + parts["dev"] + parts["test"]) == sorted(pool)
    assert all(parts.values())
    assert parts == split_tiles(pool[::-1], 0, "cat")
    with pytest.raises(ValueError, match="three"):
        split_tiles(pool[:2], 0, "cat")
