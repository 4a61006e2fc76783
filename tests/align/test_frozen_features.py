"""Features of frozen towers through the cache, for towers that need more than pixels or one window."""

from __future__ import annotations

import pytest
import soundfile
import torch
from tower_families import FAMILIES, inputs_of, items

from mmllm.align.frozen import FrozenFeatures
from mmllm.align.model import pooled_texts
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


@pytest.mark.parametrize("name", ["siglip2", "clip"])
def test_threads_that_compute_alone_find_the_same(name, tmp_path):
    FAMILIES[name].write(tmp_path / "model")
    tower = load_tower(str(tmp_path / "model"), "vision")
    records = []
    for i, picture in enumerate(items("vision") * 3):
        picture.rotate(10 * i).save(tmp_path / f"{i}.png")
        records.append({"id": str(i), "image": str(tmp_path / f"{i}.png")})
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            frozen = FrozenFeatures(FeatureCache(tmp_path / str(threads)), torch.float32, torch.device("cpu"), 2)
            found.append(frozen(tower, records, ["pooled"])["pooled"])
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert found[0].shape == (1, len(records), tower.hidden_size)
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-5)


def test_texts_of_mixed_length_keep_their_order(world):
    tower = load_tower(str(world / "text"), "text")
    texts = [f"a {'very ' * (i % 5)}red thing {i}" for i in range(9)]
    together = pooled_texts(tower, texts, batch_size=4)
    torch.testing.assert_close(together, torch.cat([pooled_texts(tower, [t]) for t in texts]), atol=1e-5, rtol=1e-5)


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


def test_texts_are_encoded_once_and_those_of_a_tower_that_trains_each_time(tmp_path, world):
    tower = load_tower(str(world / "text"), "text")
    texts = [f"a picture of {c}" for c in ("red", "green", "blue")]
    ran = []
    tower.register_forward_hook(lambda *_: ran.append(1))
    make = lambda: FrozenFeatures(FeatureCache(tmp_path / "cache"), torch.float32, torch.device("cpu"))  # noqa: E731
    frozen, expected = make(), pooled_texts(tower, texts)
    torch.testing.assert_close(frozen.texts(tower, texts), expected)
    count = len(ran)
    torch.testing.assert_close(make().texts(tower, texts), expected)
    assert len(ran) == count and frozen.texts(tower, texts[:2]).shape == (2, 32)
    with frozen.changing([tower]):
        count = len(ran)
        frozen.texts(tower, texts)
        assert len(ran) == count + 1
        next(p for p in tower.parameters() if p.ndim == 2).data.add_(1.0)
    assert not torch.allclose(frozen.texts(tower, texts), expected)  # after training, too, it is run anew
    assert not torch.allclose(make().texts(tower, texts), expected)  # other weights are another key
