"""Videos as a modality: frames through a picture encoder, frozen and training, from lists, folders and films."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from PIL import Image

from mmllm.align import load_align
from mmllm.config import parse_config
from mmllm.data.video import load_video
from mmllm.errors import UserError
from mmllm.evaluate.embed import Embedder
from mmllm.report.figures import read_figures
from mmllm.train.align import AlignConfig, AlignStage, align


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("MMLLM_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def films(world, tmp_path):
    """Records of the tiny world whose picture fades in, as a list of frames, a folder or a GIF."""
    for split in ("train", "val"):
        rows = []
        for line in (world / f"things_{split}.jsonl").read_text().splitlines():
            row = json.loads(line)
            picture = Image.open(world / row.pop("image")).convert("RGB").resize((64, 64))
            frames = [Image.blend(Image.new("RGB", (64, 64), "white"), picture, k / 3) for k in range(1, 4)]
            folder = tmp_path / row["id"]
            folder.mkdir()
            files = [folder / f"{k}.png" for k in range(3)]
            for frame, file in zip(frames, files):
                frame.save(file)
            kind = len(rows) % 3
            row["video"] = [str(f) for f in files] if kind == 0 else str(folder)
            if kind == 2:
                row["video"] = str(tmp_path / f"{row['id']}.gif")
                frames[0].save(row["video"], save_all=True, append_images=frames[1:])
            rows.append(row)
        (tmp_path / f"films_{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return tmp_path


def film_settings(settings, films, trains):
    vit = settings["streams"]["image"]["tower"]
    phase = settings["phases"]["both"]
    phase["sources"] = {
        "films": {
            "data": str(films / "films_train.jsonl"),
            "streams": ["video", "text"],
            "sampler": "distinct",
            "frames": 3,
        }
    }
    phase["objectives"] = [{"type": "infonce", "options": {"pair": ["video", "text"]}}]
    phase |= {"trains": trains, "train": {"max_steps": 40}}
    return settings | {
        "words": None,
        "streams": {
            "video": {"modality": "video", "tower": {**vit, "pooling": "attention"}, "head": {"norm": True}},
            "text": settings["streams"]["text"],
        },
        "phases": {"both": phase},
        "measures": {
            "films": {
                "kind": "pairs",
                "data": str(films / "films_val.jsonl"),
                "streams": ["video", "text"],
                "frames": 3,
                "by": "label",
            }
        },
    }


def test_a_run_learns_from_videos_and_its_folder_loads(settings, films, tmp_path):
    out = align(parse_config(film_settings(settings, films, ["video", "text.head"]), AlignConfig), tmp_path / "run")
    figures = {f.name: f for f in read_figures(out / "final" / "results.json")}
    assert figures["films_video_to_text_r1"].value > 2 * figures["films_video_to_text_r1"].chance
    model = load_align(out)
    records = [json.loads(x) for x in (films / "films_val.jsonl").read_text().splitlines()]
    rows = model.embed("video", [load_video(r["video"], 3) for r in records[:4]])
    embedder = Embedder(out)
    again = embedder.embed("video", [embedder.load("video", r["video"]) for r in records[:4]])
    torch.testing.assert_close(rows, again)


def test_frozen_features_are_those_of_the_tower(settings, films):
    made = film_settings(settings, films, ["video.head", "text.head"])
    stage = AlignStage(parse_config(made, AlignConfig))
    spec = stage.config.phases["both"].sources["films"]
    frozen = stage._source("films", spec, {"video": {"embedding"}, "text": {"embedding"}}, set(), 0, 8, False)
    live = stage._source("films", copy.deepcopy(spec), {"video": {"embedding"}}, {"video"}, 0, 8, False)
    one, two = (s.batch(0)["streams"]["video"] for s in (frozen, live))
    assert two["pixel_values"].shape == (8, 3, 3, 64, 64)
    with torch.no_grad():
        expected = stage.model.tower("video")(**two).pooled
    torch.testing.assert_close(one["pooled"].float(), expected, atol=0.05, rtol=0.05)


def test_videos_give_evenly_spaced_frames(tmp_path):
    shades = [Image.new("RGB", (8, 8), (k * 20,) * 3) for k in range(10)]
    shades[0].save(tmp_path / "a.gif", save_all=True, append_images=shades[1:])
    for k, shade in enumerate(shades):
        shade.save(tmp_path / f"{k}.png")
    files = [tmp_path / f"{k}.png" for k in range(10)]
    for medium in (files, tmp_path / "a.gif", (tmp_path / "a.gif").read_bytes()):
        grey = [f.getpixel((4, 4))[0] for f in load_video(medium, 5)]
        assert [round(g / 20) for g in grey] == [1, 3, 5, 7, 9]
    assert len(load_video(files, 20)) == 10
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.mp4").write_bytes(b"nothing")
    for medium, words in (
        (tmp_path / "none.gif", "cannot open this video"),
        (tmp_path / "empty", "without frames"),
        (tmp_path / "bad.mp4", "PyAV|not a video"),
    ):
        with pytest.raises(UserError, match=words):
            load_video(medium)
