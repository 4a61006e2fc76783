"""The tower over characters."""

from __future__ import annotations

import pytest
import torch

from mmllm.blocks.pooling import masked_mean
from mmllm.data.input_transforms import MaskTokens
from mmllm.errors import UserError
from mmllm.towers import load_tower, save_tower

SMALL = {"model": "tiny:char_gru", "hidden_size": 16, "attention_size": 8, "heads": 2}


@pytest.fixture
def tower():
    torch.manual_seed(0)
    return load_tower(SMALL, "text")


def test_padding_changes_nothing(tower):
    alone, beside = tower(**tower.encode(["a cat"])), tower(**tower.encode(["a cat", "a much longer text"]))
    torch.testing.assert_close(alone.pooled[0], beside.pooled[0])
    torch.testing.assert_close(alone.tokens[0], beside.tokens[0, :5])
    assert beside.mask.sum(1).tolist() == [5, 18] and alone.pooled.shape == (1, 32)


def test_attention_without_weights_is_the_mean(tower):
    for head in tower.attention:
        torch.nn.init.zeros_(head.outer.weight)
        torch.nn.init.zeros_(head.outer.bias)
    out = tower(**tower.encode(["a cat", "a much longer text"]))
    torch.testing.assert_close(out.pooled, masked_mean(out.tokens, out.mask).repeat(1, 2))


def test_each_feature_has_its_own_weights(tower):
    out = tower(**tower.encode(["a cat"]))
    head = tower.attention[0]
    weights = head.outer(torch.tanh(head.inner(out.tokens[0]))).softmax(0)
    torch.testing.assert_close(out.pooled[0, :16], (weights * out.tokens[0]).sum(0))
    assert weights.std(1).min() > 0


@pytest.mark.parametrize("text", ["", "ä€", "猫 😀", "שלום", "x" * 1000])
def test_any_text_has_an_embedding(tower, text):
    out = tower(**tower.encode([text, "cat"]))
    assert torch.isfinite(out.pooled).all() and out.tokens.shape[1] <= tower.max_length
    assert tower.encode([])["input_ids"].shape[0] == 0


def test_both_directions_are_read(tower):
    a, b, c = tower(**tower.encode(["abc", "abd", "xbc"])).tokens
    assert not torch.allclose(a[0], b[0]) and not torch.allclose(a[2], c[2])


def test_saved_and_loaded(tower, tmp_path):
    save_tower(tower, tmp_path / "tower")
    again = load_tower(str(tmp_path / "tower"), "text")
    inputs = tower.encode(["a cat"])
    torch.testing.assert_close(again(**inputs).pooled, tower(**inputs).pooled)
    assert again.to_config() == tower.to_config()


def test_characters_can_be_masked(tower):
    masking = MaskTokens(p=0.5)
    masking.setup(tower)
    inputs = tower.encode(["a cat", "a much longer text"])
    changed, extras = masking(inputs, torch.Generator().manual_seed(0))
    assert (extras["labels"][0, 5:] == -100).all() and (extras["labels"] >= 0).any()
    assert torch.isfinite(tower(**changed).pooled).all()


def test_an_odd_width_is_refused():
    with pytest.raises((ValueError, UserError), match="odd"):
        load_tower({"model": "tiny:char_gru", "hidden_size": 5}, "text")
