"""Derived streams: second views with their own boxes, masked words and patches, teachers, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch

from mmllm.align.config import StreamConfig
from mmllm.align.step import AlignStep
from mmllm.config import parse_config
from mmllm.data.input_transforms import MaskPatches, MaskTokens
from mmllm.errors import UserError
from mmllm.towers import load_tower
from mmllm.train.align import AlignConfig, AlignStage
from mmllm.train.align_objectives import phase_parts
from mmllm.train.align_trains import groups, teachers
from mmllm.train.run import RunFolder

CROP = {"type": "random_resized_crop", "scale": [0.3, 0.5], "keep": 0.0}


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("MMLLM_CACHE", str(tmp_path_factory.mktemp("cache")))


def source_of(settings, derived_streams, data, want, training, **source):
    """A source of the tiny world with derived streams."""
    settings = copy.deepcopy(settings)
    settings["streams"] |= derived_streams
    spec = settings["phases"]["both"]["sources"]["things"]
    spec |= {"data": data, "augment": "none", "sampler": "shuffle", **source}
    stage = AlignStage(parse_config(settings, AlignConfig))
    derived = {n: s for n, s in stage.config.streams.items() if s.of}
    stage.model.of = {n: s.of for n, s in derived.items()}
    config = stage.config.phases["both"].sources["things"]
    return stage, stage._source("things", config, want, training, 0, 8, False, derived)


def test_a_second_view_has_its_own_pixels_and_boxes(settings):
    streams = {"image@crop": {"of": "image", "transforms": [CROP]}, "image@same": {"of": "image"}}
    want = {n: {"tokens"} for n in ("image", "image@crop", "image@same")}
    _, source = source_of(settings, streams, "scenes_train.jsonl", want, {"image"}, streams=["image"])
    batch = source.batch(0)
    plain, crop, same = (batch["streams"][n]["pixel_values"] for n in want)
    assert torch.equal(plain, same) and not torch.equal(plain, crop) and plain.shape == crop.shape
    records = [source.records[i] for i in batch["items"].tolist()]
    assert batch["boxes"] == [r["boxes"] for r in records]
    moved = batch["view_boxes"]["image@crop"]
    assert moved != batch["boxes"] and all(0 <= v <= 1 for boxes in moved for b in boxes for v in b["xyxy"])
    again = source.batch(0)["streams"]["image@crop"]["pixel_values"]
    assert torch.equal(crop, again)
    unchanged = source.collate(batch["items"].tolist(), None)  # plain views, as the bank sees them
    assert torch.equal(
        unchanged["streams"]["image@crop"]["pixel_values"], unchanged["streams"]["image"]["pixel_values"]
    )


def test_a_frozen_towers_second_view_is_another_copy_from_the_cache(settings):
    want = {"image": {"embedding"}, "image@other": {"embedding"}}
    streams = {"image@other": {"of": "image"}}
    options = {"streams": ["image"], "augment": "scene", "copies": 3}
    _, source = source_of(settings, streams, "scenes_train.jsonl", want, set(), **options)
    assert source.readers["image"] is source.readers["image@other"]
    rows = [torch.cat([source.batch(s)["streams"][n]["pooled"] for s in range(4)]) for n in want]
    same = (rows[0] == rows[1]).all(1)
    assert 0 < same.sum() < len(same)  # both draw among the same four views


def test_masked_words_are_labelled(world):
    tower = load_tower(str(world / "text"), "text")
    mask = MaskTokens(p=0.3)
    mask.setup(tower)
    inputs = tower.encode(["a picture of red square", "red bar"] * 100)
    out, extras = mask(inputs, torch.Generator().manual_seed(0))
    chosen = extras["labels"] != -100
    valid = inputs["attention_mask"].bool()
    assert not (chosen & ~valid).any() and chosen.any(1).all()
    assert torch.equal(extras["labels"][chosen], inputs["input_ids"][chosen])
    assert torch.equal(out["input_ids"][~chosen], inputs["input_ids"][~chosen])
    assert 0.7 < float((out["input_ids"][chosen] == mask.mask_id).float().mean()) < 0.9
    assert 0.3 <= float(chosen.sum() / valid.sum()) < 0.45  # a bit more than p: at least one of each text


def test_masked_patches_are_blank_and_told(settings):
    tower = load_tower(settings["streams"]["image"]["tower"], "vision")
    mask = MaskPatches(p=0.5, patch_size=16)
    mask.setup(tower)
    out, extras = mask({"pixel_values": torch.ones(3, 3, 64, 64)}, torch.Generator().manual_seed(0))
    assert extras["patch_mask"].shape == (3, 16) and extras["patch_mask"].sum(1).tolist() == [8] * 3
    patches = out["pixel_values"].unfold(2, 16, 16).unfold(3, 16, 16).mean((1, 4, 5)).flatten(1)
    assert torch.equal(patches == 0, extras["patch_mask"])


def teacher_settings(settings):
    settings["streams"]["image@ema"] = {"of": "image", "ema": 0.9}
    phase = settings["phases"]["both"]
    phase["objectives"] = [{"type": "infonce", "options": {"pair": ["image", "image@ema"]}}]
    phase |= {"sources": {"things": phase["sources"]["things"]}, "trains": ["image.head"], "train": {"max_steps": 3}}
    settings |= {"phases": {"both": phase}, "measures": {}}
    return settings


def test_a_teacher_copies_what_trains_and_gets_no_gradient(settings):
    stage = AlignStage(parse_config(teacher_settings(settings), AlignConfig))
    phase = stage.config.phases["both"]
    parts = phase_parts(stage.config, phase, stage.model)
    step = AlignStep(stage.model, parts.objectives, parts.terms, parts.want)
    groups(stage.config, stage.model, phase, step)
    step.teachers.update(teachers(stage.model, parts))
    assert set(step.teachers["image@ema"].copies) == {"head"}  # the frozen tower is shared, not copied
    sources = stage._sources(0, phase, parts, step)
    step({"sources": {"things": sources["things"].batch(0)}, "step": 0})["loss"].backward()
    assert all(p.grad is None for p in step.teachers.parameters())
    head = stage.model.heads["image"]
    assert head[-1].weight.grad is not None
    before, now = step.teachers["image@ema"].copies["head"][-1].weight.clone(), head[-1].weight
    with torch.no_grad():
        now += 1.0
    step.after_step(step)
    torch.testing.assert_close(step.teachers["image@ema"].copies["head"][-1].weight, 0.9 * before + 0.1 * now)


def test_a_teacher_follows_in_a_run(settings, tmp_path):
    from safetensors.torch import load_file

    config = parse_config(teacher_settings(settings), AlignConfig)
    run = RunFolder.open(tmp_path / "run", "align", config)
    stage = AlignStage(config, run)
    start = stage.model.heads["image"][-1].weight.clone()
    stage.train_phase(0, config.phases["both"])
    state = load_file(run.last_checkpoint("both") / "model.safetensors")
    end, teacher = state["model.heads.image.2.weight"], state["teachers.image@ema.copies.head.2.weight"]
    assert not torch.equal(end, start)
    # After three steps it still holds 0.9 ** 3 of the start, and what it has of the rest lies on the way.
    assert 0 < float((teacher - start).norm()) < 0.4 * float((end - start).norm())


@pytest.mark.parametrize(
    ("streams", "training", "words"),
    [
        ({"image@a": {"of": "image", "transforms": ["horizontal_flip"]}}, set(), "'horizontal_flip'.*copies: K"),
        ({"text@a": {"of": "text", "input_transforms": ["mask_tokens"]}}, set(), "runs on every batch"),
        ({"text@a": {"of": "text", "input_transforms": ["mask_patches"]}}, {"text"}, "changes vision inputs"),
    ],
)
def test_what_a_cached_tower_cannot_give_is_refused_in_one_line(settings, streams, training, words):
    want = {n: {"embedding"} for n in ("image", "text", *streams)}
    with pytest.raises(UserError, match=words) as caught:
        source_of(settings, streams, "things_train.jsonl", want, training)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "stream", "words"),
    [
        ("other", {"of": "image"}, "is named 'image@SOMETHING'"),
        ("image@a", {"of": "imag"}, "did you mean 'image'"),
        ("image@a", {"of": "image", "modality": "text"}, "that of 'image' is 'vision'"),
        ("image@a", {"of": "image", "tower": "tiny:vit"}, "either 'tower' or 'of'"),
        ("more", {"modality": "text", "tower": "x", "ema": 0.9}, "derived from another"),
    ],
)
def test_wrong_streams_are_one_line(settings, name, stream, words):
    settings["streams"][name] = stream
    with pytest.raises(UserError, match=words):
        parse_config(settings, AlignConfig)


def test_the_teachers_momentum_alone_is_enough():
    assert StreamConfig.model_validate({"of": "image", "ema": 0.5}).ema.momentum == 0.5
