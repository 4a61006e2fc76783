"""What a tower can be told: pooling, picture size, class tokens, length limits, rates, and what trains."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tower_families import inputs_of, items

from mmllm.errors import UserError
from mmllm.towers import apply_train, audio_inputs, image_inputs, load_tower, save_tower, set_image_size
from mmllm.towers.training import blocks_of, linear_layers


@pytest.fixture
def load(folder_of):
    def get(name, modality, **settings):
        return load_tower({"model": str(folder_of(name)), **settings}, modality)

    return get


@pytest.mark.parametrize("name", ["llama", "gpt2", "tiny:text"])
def test_padding_on_the_left_changes_nothing(name, folder_of):
    small = {"hidden_size": 32, "layers": 1, "heads": 2}
    spec = {"model": name, **small} if name == "tiny:text" else str(folder_of(name))
    tower = load_tower(spec, "text")
    right = tower.encode(items("text"))
    left = {k: torch.stack([r.roll(int((m == 0).sum())) for r, m in zip(v, right["attention_mask"])])
            for k, v in right.items()}  # fmt: skip
    with torch.no_grad():
        a, b = tower(**right), tower(**left)
    assert not torch.equal(left["attention_mask"], right["attention_mask"])
    torch.testing.assert_close(a.pooled, b.pooled, atol=1e-5, rtol=1e-5)
    for i in range(2):
        torch.testing.assert_close(a.tokens[i, a.mask[i]], b.tokens[i, b.mask[i]], atol=1e-5, rtol=1e-5)


def test_poolings_of_text(load):
    towers = {p: load("bert", "text", pooling=p) for p in ("mean", "last", "cls", "pooler")}
    inputs = towers["mean"].encode(items("text"))
    with torch.no_grad():
        out = {p: t(**inputs) for p, t in towers.items()}
    lengths = inputs["attention_mask"].sum(1)
    tokens = out["mean"].tokens
    assert torch.equal(out["cls"].pooled, tokens[:, 0])
    assert torch.equal(out["last"].pooled, torch.stack([t[n - 1] for t, n in zip(tokens, lengths)]))
    dense = towers["pooler"].model.pooler.dense
    torch.testing.assert_close(out["pooler"].pooled, torch.tanh(dense(tokens[:, 0])))
    # A pooler that is not used is not there: it would never get a gradient.
    assert towers["mean"].model.pooler is None


def test_poolings_of_pictures(load):
    towers = {p: load("clip", "vision", pooling=p) for p in ("auto", "cls", "mean")}
    inputs = inputs_of(towers["auto"], items("vision"))
    with torch.no_grad():
        out = {p: t(**inputs) for p, t in towers.items()}
        raw = towers["auto"].model(**inputs)
    assert torch.equal(out["auto"].pooled, raw.pooler_output)
    assert torch.equal(out["cls"].pooled, raw.last_hidden_state[:, 0])
    assert torch.equal(out["mean"].pooled, raw.last_hidden_state[:, 1:].mean(1))


def test_class_tokens_can_be_kept(load):
    kept, dropped = load("dinov3", "vision", keep_prefix=True), load("dinov3", "vision")
    inputs = inputs_of(kept, items("vision"))
    with torch.no_grad():
        a, b = kept(**inputs, layers=(1,)), dropped(**inputs, layers=(1,))
    assert a.num_prefix == 3 and torch.equal(a.tokens[:, 3:], b.tokens) and a.grid == b.grid == (1, 4, 4)
    assert torch.equal(a.layers[1][:, 3:], b.layers[1])


@pytest.mark.parametrize("name", ["clip", "siglip", "dinov2", "dinov3", "vit", "swin", "resnet"])
def test_pictures_of_another_size(name, load, tmp_path):
    tower = load(name, "vision", image_size=64)
    inputs = inputs_of(tower, items("vision"))
    with torch.no_grad():
        out = tower(**inputs)
    assert inputs["pixel_values"].shape[-2:] == (64, 64)
    assert out.grid == tower.grid and out.tokens.shape[1] == tower.num_tokens() == out.grid[1] * out.grid[2]
    save_tower(tower, tmp_path)
    assert load_tower(str(tmp_path), "vision").grid == tower.grid


def test_naflex_takes_no_picture_size(load):
    with pytest.raises(UserError, match="image_size"):
        set_image_size(load("siglip2", "vision").preprocessor(), 64)


def test_naflex_padding_is_masked(load):
    tower = load("siglip2", "vision")
    inputs = inputs_of(tower, items("vision"))
    assert not bool(inputs["pixel_attention_mask"].all())
    with torch.no_grad():
        out = tower(**inputs)
        padded = ~inputs["pixel_attention_mask"].bool()
        noisy = tower(**{**inputs, "pixel_values": inputs["pixel_values"].masked_fill(padded[..., None], 5.0)})
    assert torch.equal(out.mask, ~padded) and out.grid is None
    assert torch.equal(out.pooled, noisy.pooled) and torch.equal(out.tokens[out.mask], noisy.tokens[out.mask])


def test_a_missing_pooler_is_told_and_not_used(load, caplog):
    tower = load("vit_without_pooler", "vision")
    assert tower.pooling == "cls" and tower.model.pooler is None and "no weights for its pooler" in caplog.text
    with pytest.raises(UserError, match="weights of the vision model are missing: pooler"):
        load("vit_without_pooler", "vision", pooling="pooler")


def test_missing_weights_are_an_error(folder_of, tmp_path):
    shutil.copytree(folder_of("bert"), tmp_path / "bert")
    file = tmp_path / "bert" / "model.safetensors"
    state = {k: v for k, v in load_file(file).items() if "layer.1" not in k}
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="16 weights of the text model are missing"):
        load_tower(str(tmp_path / "bert"), "text")


@pytest.mark.parametrize(("name", "modality"), [("clip_text", "text"), ("ast", "audio"), ("clip", "vision")])
def test_folders_from_before_there_was_a_choice_keep_their_pooling(name, modality, load, tmp_path):
    save_tower(load(name, modality), tmp_path)
    (tmp_path / "tower.json").write_text(json.dumps({"modality": modality, "layer": -1, "encoder_only": False}))
    tower = load_tower(str(tmp_path), modality)
    inputs = inputs_of(tower, items(modality))
    with torch.no_grad():
        out = tower(**inputs)
    if modality == "vision":
        assert torch.equal(out.pooled, tower.model(**inputs).pooler_output)
    else:
        expected = torch.stack([t[m].mean(0) for t, m in zip(out.tokens, out.mask)])
        torch.testing.assert_close(out.pooled, expected)


def test_sounds_of_another_rate_are_resampled(load):
    extractor = load("wav2vec2", "audio").preprocessor()
    t = np.arange(48000) / 48000
    fast = np.sin(2 * np.pi * 440 * t).astype(np.float32)
    slow = np.sin(2 * np.pi * 440 * np.arange(16000) / 16000).astype(np.float32)
    a, b = audio_inputs(extractor, [fast], 48000), audio_inputs(extractor, [slow])
    assert a["input_features"].shape == b["input_features"].shape
    # The filter's ends ring; the middle is the same tone.
    torch.testing.assert_close(a["input_features"][:, 500:-500], b["input_features"][:, 500:-500], atol=0.02, rtol=0)


def test_long_sounds_are_cut(load, tmp_path):
    wave = items("audio")[0]
    limits = {"wav2vec2": 0.5, "whisper": 2.0, "ast": 1.295, "clap": 1.0}
    for name, seconds in limits.items():
        tower = load(name, "audio", **({"max_seconds": seconds} if name == "wav2vec2" else {}))
        long = np.concatenate([wave, wave])
        cut = audio_inputs(tower.preprocessor(), [long])
        whole = audio_inputs(tower.preprocessor(), [long[: round(seconds * 16000)]])
        torch.testing.assert_close(cut["feature_attention_mask"], whole["feature_attention_mask"])
        if name != "whisper":  # the last frame of its window also sees what comes next
            torch.testing.assert_close(cut["input_features"], whole["input_features"], atol=1e-5, rtol=1e-5)
        save_tower(tower, tmp_path / name)
        again = load_tower(str(tmp_path / name), "audio")
        assert torch.equal(audio_inputs(again.preprocessor(), [long])["input_features"], cut["input_features"])


def test_whisper_marks_the_frames_that_hold_sound(load):
    tower = load("whisper", "audio")
    inputs = audio_inputs(tower.preprocessor(), [np.ones(16000, np.float32), np.ones(4000, np.float32)])
    with torch.no_grad():
        out = tower(**inputs)
    # A window of 2 s has 100 tokens of 20 ms.
    assert out.mask.sum(1).tolist() == [50, 13] and out.tokens.shape[1] == 100
    torch.testing.assert_close(out.pooled[1], out.tokens[1, :13].mean(0))


def test_clap_gives_the_same_features_twice_whatever_the_company(load):
    for name in ("clap", "clap_fused"):
        extractor = load(name, "audio").preprocessor()
        long, short = items("audio")
        long = np.concatenate([long, 0.1 * long, long])
        state = np.random.get_state()[1].copy()
        both, alone = audio_inputs(extractor, [short, long]), audio_inputs(extractor, [long])
        assert (np.random.get_state()[1] == state).all()
        assert torch.equal(both["input_features"][1], alone["input_features"][0])
        assert both["is_longer"].tolist() == [[False], [name == "clap_fused"]]


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ("some", "no choice of what trains"),
        ({"last_n": 3}, "2 blocks, not 3"),
        ({"last_n": 0}, "last_n"),
        ({"last_n": 1, "lora": {}}, "exactly one"),
        ({}, "exactly one"),
        ({"lora": {"targets": ["q_prj"]}}, "matches.*k_proj.*q_proj"),
        ({"lora": {"rank": 4}}, "rank"),
        ({"first_n": 1}, "first_n"),
    ],
)
def test_choices_that_match_nothing_are_told(choice, words, load):
    with pytest.raises(UserError, match=words) as caught:
        apply_train(load("clip", "vision"), choice)
    assert "\n" not in str(caught.value)


def test_a_tower_of_convolutions_has_nothing_for_adapters():
    with pytest.raises(UserError, match="no linear layer"):
        load_tower({"model": "tiny:audio", "hidden_size": 32, "train": {"lora": {}}}, "audio")


def test_only_named_layers_get_adapters(load):
    tower = load("llama", "text", train={"lora": {"targets": ["q_proj", "v_proj"], "r": 3}})
    layers = {n.split(".lora_")[0].rsplit(".", 1)[-1] for n, p in tower.named_parameters() if p.requires_grad}
    assert layers == {"q_proj", "v_proj"}
    assert sum(p.numel() for p in tower.trainable()) == 2 * 2 * 3 * (32 + 32)


def test_attention_that_reads_its_weights_itself_gets_no_adapter(load):
    tower = load("wavlm", "audio")
    names = linear_layers(tower.model, blocks_of(tower))
    assert names and all("feed_forward" in n for n in names)


def test_frozen_parts_stay_in_eval_mode(load):
    tower = load("wav2vec2", "audio", train={"last_n": 1}).train()
    first, last = blocks_of(tower)
    assert last.training and not first.training and not any(m.training for m in first.modules())
    assert not tower.eval().training
    video = load_tower(
        {"model": "tiny:vit", "image_size": 16, "hidden_size": 32, "layers": 1, "heads": 2, "pooling": "attention",
         "train": "none"}, "video",
    ).train()  # fmt: skip
    assert not any(m.training for m in video.modules())


def test_a_frozen_copy_trains_what_the_original_trains(load):
    tower = load("clip", "vision", train={"last_n": 1})
    twin = tower.frozen_copy()
    assert {id(p) for p in twin.trainable()} <= {id(p) for p in twin.parameters()}
    assert len(twin.trainable()) == len(tower.trainable())


@pytest.mark.parametrize(
    ("spec", "modality", "words"),
    [
        ({"pooling": "max"}, "text", "pooling 'max'"),
        ({"pooling": "cls"}, "audio", "did you mean|valid"),
        ({"pooling": "attention", "colour": 1}, "video", "colour"),
        ({"pooling": "attentoin"}, "video", "did you mean 'attention'"),
    ],
)
def test_unknown_settings_are_named(spec, modality, words, folder_of):
    name = {"text": "bert", "audio": "whisper", "video": "clip"}[modality]
    with pytest.raises(UserError, match=words):
        load_tower({"model": str(folder_of(name)), **spec}, modality)


def test_a_model_without_the_wanted_part(folder_of):
    with pytest.raises(UserError, match="it is no audio model"):
        load_tower(str(folder_of("bert")), "audio")
    with pytest.raises(UserError, match="it is no text model"):
        load_tower(str(folder_of("whisper")), "text")
    with pytest.raises(UserError, match="no pooled output"):
        tower = load_tower({"model": str(folder_of("distilbert")), "pooling": "pooler"}, "text")
        tower(**tower.encode(["a tree"]))


def test_image_inputs_take_any_number_of_pictures(load):
    processor = load("clip", "vision").preprocessor()
    assert image_inputs(processor, [Image.new("RGB", (9, 9))] * 3)["pixel_values"].shape == (3, 3, 32, 32)
