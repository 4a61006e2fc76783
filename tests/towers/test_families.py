"""Every family of encoders through the factory, against transformers called directly: one test a property."""

from __future__ import annotations

import copy
import json
import re

import pytest
import torch
from tower_families import FAMILIES, inputs_of, items

from mmllm.towers import apply_train, build_tower, load_tower, save_tower

OWN = {
    "tiny:vit": ("vision", {"image_size": 32, "hidden_size": 32, "layers": 2, "heads": 2}),
    "tiny:text": ("text", {"hidden_size": 32, "layers": 2, "heads": 2}),
    "tiny:audio_transformer": ("audio", {"hidden_size": 32, "layers": 2, "heads": 2, "max_seconds": 1.5}),
    "tiny:audio": ("audio", {"hidden_size": 32, "depth": 2}),
}
# A bias of the keys moves all scores of a query alike, which the softmax does not see; mask tokens are not used here.
IDLE = re.compile(r"(k_proj|key|k_lin|attention)\.bias$|mask_token$|masked_spec_embed$")
CHOICES = {"full": "full", "last": {"last_n": 1}, "lora": {"lora": {"r": 2, "alpha": 4}}}
ALL = [*FAMILIES, *OWN]
NO_LINEAR_LAYERS = {("resnet", "lora"), ("tiny:audio", "lora")}  # nothing for LoRA to work on


@pytest.fixture
def tower_of(folder_of):
    def load(name, **more):
        torch.manual_seed(0)
        if name in OWN:
            return load_tower({"model": name, **OWN[name][1], **more}, OWN[name][0])
        family = FAMILIES[name]
        return load_tower({"model": str(folder_of(name)), **family.settings, **more}, family.modality)

    return load


def features(tower, things, **more):
    with torch.no_grad():
        return tower(**inputs_of(tower, things), **more)


def settings(tower):
    """Without the model's own config, where transformers writes down which class it was loaded as."""
    return {k: v for k, v in tower.to_config().items() if k != "config"}


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_and_pooled_are_those_of_transformers(name, tower_of, folder_of):
    family, tower = FAMILIES[name], tower_of(name)
    direct = family.auto.from_pretrained(folder_of(name), dtype=torch.float32).eval()
    for thing in items(family.modality):
        inputs = inputs_of(tower, [thing])
        with torch.no_grad():
            out = tower(**inputs)
            tokens, pooled = family.expect(direct, inputs)
        torch.testing.assert_close(out.tokens[0, out.mask[0]], tokens, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(out.pooled[0], pooled, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_shapes_keep_the_contract(name, tower_of):
    tower = tower_of(name)
    inputs = inputs_of(tower, items(tower.modality))
    with torch.no_grad():
        out = tower(**inputs)
    assert out.tokens.shape == (2, out.mask.shape[1], tower.hidden_size) and out.mask.dtype == torch.bool
    assert out.pooled.shape == (2, tower.pooled_size) and bool(out.pooled.isfinite().all())
    if tower.modality == "text":
        assert torch.equal(out.input_ids, inputs["input_ids"])
        assert torch.equal(out.mask, inputs["attention_mask"].bool())
    elif tower.modality == "audio":
        frames = inputs["feature_attention_mask"].sum(1).tolist()
        assert out.mask.sum(1).tolist() == [tower.num_tokens(n) for n in frames]
    elif name != "siglip2":
        assert out.grid == tower.grid and out.tokens.shape[1] == tower.num_tokens() == out.grid[1] * out.grid[2]
        assert out.num_prefix == 0 and bool(out.mask.all())


@pytest.mark.parametrize("name", ALL)
def test_a_padded_batch_gives_what_each_item_gives_alone(name, tower_of):
    tower = tower_of(name)
    both = features(tower, items(tower.modality))
    if tower.modality in ("text", "audio") and name not in ("tiny:audio", "clap", "clap_fused"):
        assert both.mask[0].sum() > both.mask[1].sum() > 0
    for i, thing in enumerate(items(tower.modality)):
        alone = features(tower, [thing])
        torch.testing.assert_close(both.pooled[i], alone.pooled[0], atol=1e-5, rtol=1e-5)
        a, b = both.tokens[i, both.mask[i]], alone.tokens[0, alone.mask[0]]
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_layers_come_on_request_with_the_same_tokens(name, tower_of):
    tower = tower_of(name)
    plain = features(tower, items(tower.modality))
    out = features(tower, items(tower.modality), layers=(0, 1, -1))
    assert plain.layers is None and set(out.layers) == {0, 1, -1}
    assert torch.equal(out.tokens, plain.tokens)
    flat = name not in ("swin", "convnext", "resnet", "clap", "clap_fused")
    if flat:
        assert all(v.shape[:2] == out.tokens.shape[:2] for v in out.layers.values())
    assert not torch.allclose(out.layers[0], out.layers[1]) if flat else out.layers[0].ndim == 3
    with pytest.raises(ValueError, match="layer 9"):
        features(tower, items(tower.modality), layers=(9,))


@pytest.mark.parametrize("name", [n for n in FAMILIES if n not in ("resnet", "convnext")])
def test_a_chosen_layer_is_that_hidden_state(name, tower_of):
    tower = tower_of(name, layer=1)
    out = features(tower, items(tower.modality), layers=(1,))
    torch.testing.assert_close(out.tokens, out.layers[1])


@pytest.mark.parametrize("name", ALL)
def test_saved_and_rebuilt_towers_are_the_same(name, tower_of, tmp_path):
    tower = tower_of(name)
    inputs = inputs_of(tower, items(tower.modality))
    with torch.no_grad():
        out = tower(**inputs)
        save_tower(tower, tmp_path)
        again = load_tower(str(tmp_path), tower.modality)
        for key, value in inputs_of(again, items(tower.modality)).items():
            assert torch.equal(value, inputs[key]), key
        rebuilt = build_tower(json.loads(json.dumps(tower.to_config()))).eval()
        rebuilt.load_state_dict(tower.state_dict())
        assert settings(again) == settings(tower) == settings(rebuilt)
        for other in (again, rebuilt):
            found = other(**inputs)
            torch.testing.assert_close(found.tokens, out.tokens, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(found.pooled, out.pooled, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_a_frozen_tower_makes_no_graph_and_stays_in_eval_mode(name, tower_of):
    tower = tower_of(name, train="none").train()
    assert tower.trainable() == [] and not any(m.training for m in tower.modules())
    out = tower(**inputs_of(tower, items(tower.modality)))
    assert out.tokens.grad_fn is None and out.pooled.grad_fn is None and not out.pooled.requires_grad


@pytest.mark.parametrize(
    ("name", "choice"),
    [(name, choice) for name in ALL for choice in CHOICES if (name, choice) not in NO_LINEAR_LAYERS],
)
def test_exactly_what_was_chosen_trains(name, choice, tower_of):
    tower = tower_of(name)
    choice = CHOICES[choice]
    chosen = apply_train(tower, choice)
    names = {id(p): n for n, p in tower.named_parameters()}
    assert chosen == tower.trainable() and {id(p) for p in chosen} == {
        id(p) for p in tower.parameters() if p.requires_grad
    }
    before = copy.deepcopy(tower.state_dict())
    inputs = inputs_of(tower, items(tower.modality))
    for _ in range(2):  # with adapters, whose second matrix starts at 0, the first one moves in the second step
        out = tower(**inputs)
        loss = (out.pooled * torch.linspace(-1, 1, out.pooled.shape[1])).sum() + out.tokens[out.mask].square().mean()
        tower.zero_grad()
        loss.backward()
        torch.optim.SGD(chosen, lr=0.05).step()
    moved = {n for n, p in tower.named_parameters() if not torch.equal(p, before[n])}
    wanted = {names[id(p)] for p in chosen}
    assert moved <= wanted and moved
    idle = wanted - moved
    assert all(IDLE.search(n) for n in idle), idle


@pytest.mark.parametrize("name", ALL)
def test_only_the_last_block_and_what_follows_trains(name, tower_of):
    tower = tower_of(name, train={"last_n": 1})
    share = sum(p.numel() for p in tower.trainable()) / sum(p.numel() for p in tower.parameters())
    assert 0 < share < 0.9
    before = features(tower, items(tower.modality), layers=(1,)).layers[1]
    with torch.no_grad():
        for p in tower.trainable():
            p.add_(0.1)
    after = features(tower, items(tower.modality), layers=(1,))
    if name not in ("clap", "clap_fused", "swin", "convnext", "resnet"):  # one-block stages: 1 is the last but counted
        torch.testing.assert_close(after.layers[1], before)


@pytest.mark.parametrize("name", [n for n in ALL if n not in ("resnet", "tiny:audio")])
def test_adapters_are_merged_when_saved(name, tower_of, tmp_path):
    tower = tower_of(name, train={"lora": {"r": 2, "alpha": 4}})
    plain = features(tower, items(tower.modality))
    with torch.no_grad():
        for p in tower.trainable():
            p.normal_(std=0.2, generator=torch.Generator().manual_seed(1))
    adapted = features(tower, items(tower.modality))
    assert not torch.allclose(plain.pooled, adapted.pooled, atol=1e-3)
    save_tower(tower, tmp_path)
    again = load_tower(str(tmp_path), tower.modality)
    assert [n for n, _ in again.named_parameters()] == [
        n.replace(".base_layer", "") for n, _ in tower.named_parameters() if "lora_" not in n
    ]
    torch.testing.assert_close(features(again, items(tower.modality)).pooled, adapted.pooled, atol=1e-4, rtol=1e-4)
