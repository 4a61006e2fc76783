"""Set-of-mark pictures: each number stands on its own thing, can be read, and the questions tell the truth."""

from __future__ import annotations

import io
import re

import numpy as np
import pytest
from PIL import Image, ImageDraw

from mmllm.data.blob import media_stamp
from mmllm.data.build import build_dataset
from mmllm.data.media import load_image
from mmllm.data.open import open_records
from mmllm.data.recipes import apply_recipes
from mmllm.data.records import Located
from mmllm.data.set_of_mark import Region, draw_marks, mark_points, mark_questions
from mmllm.errors import UserError

PLATES = [(20, 20)]


def png(image):
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def mask_of(draw, size=(200, 100)):
    image = Image.new("L", size)
    draw(ImageDraw.Draw(image))
    return png(image)


def test_a_box_is_marked_in_its_middle():
    assert mark_points((200, 100), [Region((0.1, 0.2, 0.5, 0.8))], PLATES) == [pytest.approx((60, 50))]


def test_a_mask_is_marked_at_its_deepest_point():
    """An L whose foot is a disc: the middle of the box lies outside of it, the disc's centre is deepest."""

    def shape(draw):
        draw.rectangle((10, 5, 16, 90), fill=255)
        draw.ellipse((120, 50, 160, 90), fill=255)
        draw.rectangle((10, 86, 140, 90), fill=255)

    (point,) = mark_points((200, 100), [Region((0.05, 0.05, 0.8, 0.91), mask_of(shape))], PLATES)
    assert point == pytest.approx((140.5, 70.5), abs=1.5)


def test_the_deepest_point_is_that_of_brute_force():
    rng = np.random.default_rng(0)
    for _ in range(5):
        corners = [(int(x), int(y)) for x, y in rng.uniform((0, 0), (60, 40), (5, 2))]
        data = mask_of(lambda d, c=corners: d.polygon(c, fill=255), (60, 40))
        inside = np.pad(np.asarray(Image.open(io.BytesIO(data))) > 0, 1)
        outside = np.argwhere(~inside)
        depth = {tuple(p): ((outside - p) ** 2).sum(1).min() for p in np.argwhere(inside)}
        ((x, y),) = mark_points((60, 40), [Region((0, 0, 1, 1), data)], PLATES)
        assert depth[int(y - 0.5) + 1, int(x - 0.5) + 1] == max(depth.values())


def test_numbers_of_nested_things_do_not_cover_each_other():
    regions = [Region((0, 0, 1, 1)), Region((0.3, 0.3, 0.7, 0.7)), Region((0.45, 0.45, 0.55, 0.55))]
    image = Image.new("RGB", (400, 400), (120, 120, 120))
    plates = draw_marks(image, regions, 0.06)
    for i in range(3):
        x, y = (plates[i][0] + plates[i][2]) / 2, (plates[i][1] + plates[i][3]) / 2
        box = [v * 400 for v in regions[i].xyxy]
        assert box[0] <= x <= box[2] and box[1] <= y <= box[3], "on its own thing"
        for j in range(i):
            a, b = plates[i], plates[j]
            assert a[2] < b[0] or b[2] < a[0] or a[3] < b[1] or b[3] < a[1]


def luminance(rgb):
    x = np.asarray(rgb, float) / 255
    x = np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
    return float(x @ (0.2126, 0.7152, 0.0722))


@pytest.mark.parametrize("ground", [(0, 0, 0), (255, 255, 255), (200, 30, 30), (30, 30, 200), (119, 119, 119)])
def test_a_plate_differs_from_its_ground_and_its_number_from_the_plate(ground):
    image = Image.new("RGB", (300, 200), ground)
    ((x0, y0, x1, y1),) = draw_marks(image, [Region((0.2, 0.2, 0.8, 0.8))], 0.1)
    inner = np.asarray(image.crop((x0 + 1, y0 + 1, x1, y1))).reshape(-1, 3)
    plate = tuple(int(v) for v in inner[0])
    light = sorted((luminance(plate), luminance(ground)))
    assert (light[1] + 0.05) / (light[0] + 0.05) >= 4.5, "WCAG 2's contrast for text"
    ink = (np.abs(inner.astype(int) - plate).min(1) > 200).mean()
    assert 0.05 < ink < 0.6 and {plate} <= {(0, 0, 0), (255, 255, 255)}
    outside = np.asarray(image).copy()
    outside[y0 : y1 + 1, x0 : x1 + 1] = ground
    assert (outside == ground).all(), "nothing else is drawn on"


def test_numbers_at_the_edge_stay_inside():
    image = Image.new("RGB", (60, 60), (255, 255, 255))
    regions = [Region((0, 0, 0.02, 0.02)), Region((0.98, 0.98, 1, 1))] + [Region((0.5, 0.5, 0.6, 0.6))] * 9
    for x0, y0, x1, y1 in draw_marks(image, regions, 0.3):
        assert 0 <= x0 < x1 <= 59 and 0 <= y0 < y1 <= 59


def test_questions_by_hand():
    found = {q.question: q.answer for q in mark_questions(["lion", "kite", "lion"])}
    assert found == {
        "List the numbered things.": "1: lion, 2: kite, 3: lion",
        "What is number 1?": "a lion",
        "What is number 2?": "a kite",
        "What is number 3?": "a lion",
        "Which number stands on a lion?": "1, 3",
        "Which number stands on a kite?": "2",
    }


def made(records, **options):
    items = [Located("f.jsonl", n, r) for n, r in enumerate(records, 1)]
    return [i.record for i in apply_recipes(items, [{"type": "set_of_mark", **options}])]


SCENE = {
    "id": "s",
    "image": png(Image.new("RGB", (90, 90), (255, 255, 255))),
    "boxes": [{"xyxy": [k / 4, 0, k / 4 + 0.25, 1], "text": f"thing{k}"} for k in range(4)],
}


def test_numbers_follow_the_seed_and_the_list_follows_the_numbers():
    (record,) = made([SCENE], questions=["list"])
    answer = record["branches"][0][1]["content"][0]["text"]
    named = [text for _, text in re.findall(r"(\d): (thing\d)", answer)]
    assert sorted(named) == [f"thing{k}" for k in range(4)] and named == [b["text"] for b in record["boxes"]]
    other = {made([SCENE], seed=s)[0]["boxes"][0]["text"] for s in range(12)}
    assert len(other) > 1
    picture = record["messages"][0]["content"][0]["path"]
    again = made([SCENE], questions=["list"])[0]["messages"][0]["content"][0]["path"]
    assert picture.read() == again.read() and media_stamp(picture) == media_stamp(again)
    assert media_stamp(made([SCENE], share=0.2)[0]["messages"][0]["content"][0]["path"]) != media_stamp(picture)


def test_most_things_and_bad_options():
    (record,) = made([SCENE], most=2)
    assert len(record["boxes"]) == 2 and len(record["branches"]) == 5
    for options, words in (({"questions": ["lists"]}, "'list'"), ({"share": 0}, "share")):
        with pytest.raises(UserError, match=words):
            made([SCENE], **options)


@pytest.mark.slow
def test_starter_scenes_get_their_numbers():
    folder = build_dataset("starter.yaml", "fast")
    scenes = list(open_records({"path": str(folder / "eval/scenes_seen.jsonl"), "limit": 8}))
    for scene, record in zip(scenes, made(scenes)):
        plain = np.asarray(load_image(scene["image"]), int)
        marked = np.asarray(load_image(record["messages"][0]["content"][0]["path"]), int)
        assert plain.shape == marked.shape
        changed = (plain != marked).any(-1)
        assert 0 < changed.mean() < 0.25
        height, width = changed.shape
        for box in record["boxes"]:
            x0, y0, x1, y1 = (v * n for v, n in zip(box["xyxy"], (width, height) * 2))
            assert changed[int(y0) : int(y1) + 1, int(x0) : int(x1) + 1].any()
