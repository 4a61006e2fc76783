"""timm's backbones as towers: timm called directly, saving, layers, what trains (`make test-peers` has timm)."""

from __future__ import annotations

import json

import pytest
import torch
from tower_families import inputs_of, items

from mmllm.errors import UserError
from mmllm.towers import build_tower, load_tower, save_tower
from mmllm.towers.timm_models import timm_library

SPECS = {
    "vit": ("vit_tiny_patch16_224", {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8}, 1),
    "registers": ("vit_medium_patch16_reg4_gap_256", {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2}, 4),
    "resnet": ("resnet10t", {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16], "stem_width": 8}, 0),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 32, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4},
        0,
    ),
    "mobilenet": ("mobilenetv3_small_050", {}, 0),
}


def test_without_timm_one_line_says_so(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(UserError, match="mmllm\\[timm\\]") as caught:
        load_tower("timm:resnet18", "vision")
    assert "\n" not in str(caught.value)


@pytest.fixture
def timm():
    return timm_library()


@pytest.fixture(params=SPECS)
def made(request, timm):
    name, arguments, prefix = SPECS[request.param]
    torch.manual_seed(0)
    size = {} if "img_size" in arguments else {"image_size": 64}
    tower = load_tower({"model": f"timm:{name}", "model_args": arguments, **size}, "vision")
    return tower, timm.create_model(name, num_classes=0, **arguments).eval(), prefix


@pytest.mark.peers
def test_tokens_and_pooled_are_timms(made):
    tower, direct, prefix = made
    direct.load_state_dict(tower.model.timm_model.state_dict())
    inputs = inputs_of(tower, items("vision"))
    with torch.no_grad():
        out, raw = tower(**inputs), direct.forward_features(inputs["pixel_values"])
        pooled = direct(inputs["pixel_values"])
    if raw.ndim == 4:
        raw = raw.flatten(1, 2) if getattr(direct, "output_fmt", "") == "NHWC" else raw.flatten(2).transpose(1, 2)
    torch.testing.assert_close(out.tokens, raw[:, prefix:])
    torch.testing.assert_close(out.pooled, pooled)
    assert out.grid == tower.grid and tower.num_tokens() == out.tokens.shape[1] == out.grid[1] * out.grid[2]
    assert out.tokens.shape[-1] == tower.hidden_size and out.pooled.shape[-1] == tower.pooled_size


@pytest.mark.peers
def test_saved_and_rebuilt_towers_are_the_same(made, tmp_path):
    tower = made[0]
    inputs = inputs_of(tower, items("vision"))
    save_tower(tower, tmp_path)
    again = load_tower(str(tmp_path), "vision")
    rebuilt = build_tower(json.loads(json.dumps(tower.to_config()))).eval()
    rebuilt.load_state_dict(tower.state_dict())
    assert torch.equal(inputs_of(again, items("vision"))["pixel_values"], inputs["pixel_values"])
    with torch.no_grad():
        for other in (again, rebuilt):
            torch.testing.assert_close(other(**inputs).tokens, tower(**inputs).tokens)


@pytest.mark.peers
def test_layers_and_choices_of_what_trains(made):
    tower = made[0]
    inputs = inputs_of(tower, items("vision"))
    out = tower(**inputs, layers=(0, -1))
    assert all(v.ndim == 3 for v in out.layers.values())
    spec = {"model": f"timm:{tower.config.architecture}", "model_args": tower.config.model_args}
    size = {"image_size": tower.image_size} if tower.image_size else {}
    part = load_tower({**spec, **size, "train": {"last_n": 1}}, "vision")
    part(**inputs).pooled.square().sum().backward()
    got = [p for p in part.parameters() if p.grad is not None]
    assert 0 < len(got) < len(list(part.parameters())) and {id(p) for p in got} == {id(p) for p in part.trainable()}


@pytest.mark.peers
def test_a_folder_in_timms_own_layout(timm, tmp_path):
    from safetensors.torch import save_file

    torch.manual_seed(0)
    arguments = SPECS["resnet"][1]
    direct = timm.create_model("resnet10t", num_classes=3, **arguments).eval()
    save_file({k: v.contiguous() for k, v in direct.state_dict().items()}, tmp_path / "model.safetensors")
    about = {"input_size": [3, 64, 64], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear"}
    config = {"architecture": "resnet10t", "num_classes": 3, "model_args": arguments, "pretrained_cfg": about}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tower = load_tower(str(tmp_path), "vision")
    inputs = inputs_of(tower, items("vision"))
    assert inputs["pixel_values"].shape == (2, 3, 64, 64)
    with torch.no_grad():
        out, pooled = tower(**inputs), direct.forward_head(direct.forward_features(inputs["pixel_values"]), True)
    torch.testing.assert_close(out.pooled, pooled)
    assert out.grid == tower.grid == (1, 2, 2)


@pytest.mark.peers
def test_an_unknown_name_gets_the_nearest(timm):
    with pytest.raises(UserError, match="did you mean 'resnet18'"):
        load_tower("timm:resnet18x", "vision")
