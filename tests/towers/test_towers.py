"""Every tower keeps the contract: shapes, masks, counts, and the same output after saving, loading and rebuilding."""

from __future__ import annotations

import pytest
import torch
from tower_families import inputs_of, items

from mmllm.errors import UserError
from mmllm.towers import audio_inputs, build_tower, image_inputs, load_preprocessor, load_tower, save_tower
from mmllm.towers.efficientnet import EfficientNetLite0Tower


@pytest.mark.parametrize("spec", ["tiny:vit", "tiny:audio"])
def test_the_preprocessor_is_found_in_a_towers_folder(spec, tmp_path):
    modality = "audio" if "audio" in spec else "vision"
    tower = load_tower(spec, modality)
    save_tower(tower, tmp_path)
    make = audio_inputs if modality == "audio" else image_inputs
    inputs = inputs_of(tower, items(modality))
    for name, value in make(load_preprocessor(tmp_path, modality), items(modality)).items():
        assert torch.equal(value, inputs[name])


def test_chosen_layer_is_saved(folder_of, tmp_path):
    folder = str(folder_of("clip"))
    last, earlier = load_tower(folder, "vision"), load_tower({"model": folder, "layer": -2}, "vision")
    inputs = inputs_of(last, items("vision"))
    assert not torch.allclose(last(**inputs).tokens, earlier(**inputs).tokens)
    save_tower(earlier, tmp_path / "saved")
    assert torch.allclose(load_tower(str(tmp_path / "saved"), "vision")(**inputs).tokens, earlier(**inputs).tokens)


def test_word_embeddings_are_their_only_layer(folder_of, tmp_path):
    tower = load_tower({"type": "word_embeddings", "model": str(folder_of("llama"))}, "text")
    out = tower(**tower.encode(["red bird", "tree"]), layers=(0,))
    assert torch.equal(out.layers[0], out.tokens) and out.mask.sum(1).tolist() == [2, 1]
    torch.testing.assert_close(out.pooled[1], out.tokens[1, 0])


def test_efficientnet_shapes_and_frozen_statistics():
    tower = build_tower({"model_type": "efficientnet_lite0", "image_size": 96})
    before = tower._bn0.running_mean.clone()
    out = tower.train()(torch.randn(2, 3, 96, 128))
    assert out.tokens.shape == (2, 12, 1280) and out.grid == (1, 3, 4) and tower.num_tokens() == 9
    assert torch.equal(tower._bn0.running_mean, before)
    assert torch.allclose(out.pooled, out.tokens.mean(1))
    taps = tower(torch.randn(2, 3, 96, 128), layers=(0, -1)).layers
    assert taps[0].shape == (2, 48 * 64, 32) and taps[-1].shape == (2, 12, 320)


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


def test_sound_tokens_are_laid_out_anew_and_learn_the_same():
    """Tokens and the last block's own states are the same numbers; so are the gradients that come back through them."""
    torch.manual_seed(0)
    tower = load_tower({"model": "tiny:audio", "hidden_size": 32}, "audio").double().train()
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs_of(tower, items("audio")).items()}
    factor, gradients = torch.randn(2, tower.num_tokens(), 32, dtype=torch.float64), []
    for own in (True, False):
        tower.zero_grad()
        out = tower(**inputs, layers=(-1,))
        assert out.tokens.is_contiguous() and torch.equal(out.tokens, out.layers[-1])
        ((out.tokens if own else out.layers[-1]) * factor[: len(out.tokens)]).sum().backward()
        gradients.append(tower.stem[0].conv.weight.grad.clone())
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(*gradients)
