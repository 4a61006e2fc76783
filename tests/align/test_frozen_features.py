"""Features of frozen towers through the cache, for towers that need more than pixels or one window."""

from __future__ import annotations

import pytest
import soundfile
import torch
from tower_families import FAMILIES, inputs_of, items

from mmllm.align.frozen import FrozenFeatures
from mmllm.data.features import FeatureCache
from mmllm.data.media import load_audio
from mmllm.towers import load_tower


@pytest.mark.parametrize("name", ["siglip2", "clip", "clap_fused", "wav2vec2"])
def test_cached_features_are_the_towers(name, tmp_path):
    family = FAMILIES[name]
    family.write(tmp_path / "model")
    tower = load_tower(str(tmp_path / "model"), family.modality)
    field = {"vision": "image", "audio": "audio"}[family.modality]
    records = []
    for i, thing in enumerate(items(family.modality)):
        path = tmp_path / (f"{i}.png" if field == "image" else f"{i}.wav")
        thing.save(path) if field == "image" else soundfile.write(path, thing, 16000, subtype="FLOAT")
        records.append({"id": str(i), field: str(path)})
    frozen = FrozenFeatures(FeatureCache(tmp_path / "cache"), torch.float32, torch.device("cpu"))
    found = frozen(tower, records, ["tokens", "pooled"])
    things = items("vision") if field == "image" else [load_audio(r["audio"], 16000) for r in records]
    with torch.no_grad():
        out = tower(**inputs_of(tower, things))
    torch.testing.assert_close(found["pooled"][0], out.pooled, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found["tokens"][0][out.mask], out.tokens[out.mask], atol=1e-5, rtol=1e-5)
    # Of sounds the mask is always kept: a chunk without padding must have the same columns as one with it.
    assert ("mask" in found) == (family.modality == "audio" or not bool(out.mask.all()))
    again = frozen(tower, records, ["tokens", "pooled"])
    assert torch.equal(again["pooled"], found["pooled"])


def test_pictures_of_another_size_through_any_tower(tmp_path):
    FAMILIES["clip"].write(tmp_path / "model")
    tower = load_tower(str(tmp_path / "model"), "vision")
    records = []
    for i, picture in enumerate(items("vision")):
        picture.save(tmp_path / f"{i}.png")
        records.append({"id": str(i), "image": str(tmp_path / f"{i}.png")})
    frozen = FrozenFeatures(FeatureCache(tmp_path / "cache"), torch.float32, torch.device("cpu"))
    large = frozen(tower, records, ["tokens"], image_size=64)["tokens"]
    assert large.shape == (1, 2, 64, 32) and frozen(tower, records, ["tokens"])["tokens"].shape == (1, 2, 16, 32)
