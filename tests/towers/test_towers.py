"""Every tower keeps the contract: shapes, masks, counts, and the same output after saving, loading and rebuilding."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    ASTModel,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    SiglipConfig,
    SiglipModel,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperModel,
)

from mmllm.errors import UserError
from mmllm.towers import audio_inputs, build_tower, image_inputs, load_preprocessor, load_tower, save_tower
from mmllm.towers.efficientnet import EfficientNetLite0Tower

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
PROCESSOR = {"size": {"height": 32, "width": 32}, "crop_size": {"height": 32, "width": 32}}


def clip_folder(path):
    CLIPVisionModel(CLIPVisionConfig(**SMALL, image_size=32, patch_size=8)).save_pretrained(path)
    CLIPImageProcessorPil(**PROCESSOR).save_pretrained(path)


def siglip_folder(path):
    vision = dict(SMALL, image_size=32, patch_size=8)
    SiglipModel(SiglipConfig(text_config=dict(SMALL, vocab_size=50), vision_config=vision)).save_pretrained(path)
    CLIPImageProcessorPil(**PROCESSOR).save_pretrained(path)


def whisper_folder(path):
    config = WhisperConfig(
        d_model=32, encoder_layers=2, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=64, decoder_ffn_dim=64, max_source_positions=100, num_mel_bins=80, vocab_size=60,
        pad_token_id=1, bos_token_id=1, eos_token_id=1, decoder_start_token_id=1,
    )  # fmt: skip
    WhisperModel(config).save_pretrained(path)
    WhisperFeatureExtractor(chunk_length=2).save_pretrained(path)


def wav2vec_folder(path):
    config = Wav2Vec2Config(**SMALL, conv_dim=(16, 16), conv_stride=(5, 4), conv_kernel=(10, 8),
                            num_feat_extract_layers=2,
                            num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2)  # fmt: skip
    Wav2Vec2Model(config).save_pretrained(path)
    Wav2Vec2FeatureExtractor(return_attention_mask=True).save_pretrained(path)


def ast_folder(path):
    ASTModel(ASTConfig(**SMALL, max_length=128, num_mel_bins=32)).save_pretrained(path)
    ASTFeatureExtractor(max_length=128, num_mel_bins=32).save_pretrained(path)


FOLDERS = {
    "clip": ("vision", clip_folder),
    "siglip": ("vision", siglip_folder),
    "whisper": ("audio", whisper_folder),
    "wav2vec2": ("audio", wav2vec_folder),
    "ast": ("audio", ast_folder),
}


def some_input(preprocessor, modality):
    if modality == "vision":
        rng = np.random.default_rng(0)
        return image_inputs(preprocessor, [Image.fromarray(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8))] * 2)
    t = np.arange(24000) / 16000
    return audio_inputs(
        preprocessor, [np.sin(2 * np.pi * 440 * t).astype(np.float32), np.sin(1500 * t[:12000]).astype(np.float32)]
    )


def check_contract(tower, inputs):
    with torch.no_grad():
        out = tower(**inputs)
    assert out.tokens.shape == (2, out.mask.shape[1], tower.hidden_size) and out.mask.dtype == torch.bool
    assert out.pooled.shape == (2, tower.hidden_size)
    if tower.modality == "vision":
        assert out.tokens.shape[1] == tower.num_tokens() == out.grid[1] * out.grid[2]
    else:
        frames = inputs["feature_attention_mask"].sum(1).tolist()
        assert out.mask.sum(1).tolist() == [tower.num_tokens(n) for n in frames]
    return out


@pytest.mark.parametrize("spec", ["tiny:vit", "tiny:audio"])
def test_own_tower_round_trip(spec, tmp_path):
    modality = "audio" if "audio" in spec else "vision"
    tower = load_tower(spec, modality)
    inputs = some_input(tower.preprocessor(), modality)
    out = check_contract(tower, inputs)
    save_tower(tower, tmp_path)
    again = load_tower(str(tmp_path), modality)
    for name, value in some_input(load_preprocessor(tmp_path, modality), modality).items():
        assert torch.equal(value, inputs[name])
    assert torch.equal(again(**inputs).tokens, out.tokens)
    rebuilt = build_tower(json.loads(json.dumps(tower.to_config()))).eval()
    rebuilt.load_state_dict(tower.state_dict())
    assert torch.equal(rebuilt(**inputs).pooled, out.pooled)


@pytest.mark.parametrize("family", FOLDERS)
def test_transformers_tower_round_trip(family, tmp_path):
    modality, make = FOLDERS[family]
    make(tmp_path / "model")
    tower = load_tower(str(tmp_path / "model"), modality)
    inputs = some_input(tower.preprocessor(), modality)
    out = check_contract(tower, inputs)
    save_tower(tower, tmp_path / "saved")
    again = load_tower(str(tmp_path / "saved"), modality)
    assert torch.allclose(again(**inputs).tokens, out.tokens, atol=1e-6)
    rebuilt = build_tower(json.loads(json.dumps(tower.to_config()))).eval()
    rebuilt.load_state_dict(tower.state_dict())
    assert torch.allclose(rebuilt(**inputs).pooled, out.pooled, atol=1e-6)


def test_chosen_layer_is_saved(tmp_path):
    clip_folder(tmp_path / "model")
    last = load_tower(str(tmp_path / "model"), "vision")
    earlier = load_tower({"model": str(tmp_path / "model"), "layer": -2}, "vision")
    inputs = some_input(last.preprocessor(), "vision")
    assert not torch.allclose(last(**inputs).tokens, earlier(**inputs).tokens)
    save_tower(earlier, tmp_path / "saved")
    assert torch.allclose(load_tower(str(tmp_path / "saved"), "vision")(**inputs).tokens, earlier(**inputs).tokens)


def test_efficientnet_shapes_and_frozen_statistics():
    tower = build_tower({"model_type": "efficientnet_lite0", "image_size": 96})
    before = tower._bn0.running_mean.clone()
    out = tower.train()(torch.randn(2, 3, 96, 128))
    assert out.tokens.shape == (2, 12, 1280) and out.grid == (1, 3, 4) and tower.num_tokens() == 9
    assert torch.equal(tower._bn0.running_mean, before)
    assert torch.allclose(out.pooled, out.tokens.mean(1))


def test_the_frozen_copy_is_the_same_function_without_batchnorm():
    torch.manual_seed(0)
    tower = EfficientNetLite0Tower(64)
    for module in tower.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # statistics as training would have left them
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0, 0.2)
    twin = tower.frozen_copy()
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in twin.modules())
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(twin(pixel_values=x).tokens, tower(pixel_values=x).tokens, atol=1e-3, rtol=1e-3)
    assert any(isinstance(m, torch.nn.BatchNorm2d) for m in tower.modules())


def test_same_padding_against_explicit_padding():
    from mmllm.towers.efficientnet import SameConv2d

    conv = SameConv2d(2, 3, 3, 2, bias=False)
    x = torch.randn(1, 2, 8, 8)
    expected = torch.nn.functional.conv2d(torch.nn.functional.pad(x, (0, 1, 0, 1)), conv.weight, stride=2)
    assert torch.equal(conv(x), expected)


@pytest.mark.parametrize(
    ("spec", "modality", "words"),
    [
        ("tiny:vti", "vision", "tiny:vit"),
        ("tiny:vit", "audio", "vision tower"),
        ({"model": "tiny:vit", "patchsize": 4}, "vision", "patchsize"),
        ({"layer": 2}, "vision", "model"),
    ],
)
def test_mistakes_are_named(spec, modality, words):
    with pytest.raises(UserError, match=words):
        load_tower(spec, modality)


def test_folder_without_config(tmp_path):
    with pytest.raises(UserError, match="config.json"):
        load_tower(str(tmp_path), "vision")
