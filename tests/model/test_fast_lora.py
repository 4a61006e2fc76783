"""The fused LoRA layers compute what peft's own compute: outputs, gradients, merging; other kinds stay peft's."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_mm import tiny_llm

from mmllm.model.fast_lora import fuse_lora


def adapted(dtype=torch.float32, **changes):
    torch.manual_seed(0)
    settings = {"r": 3, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj", "down_proj"], **changes}
    model = get_peft_model(tiny_llm()[0].to(dtype), LoraConfig(**settings))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    return model


def run(model):
    """Logits, gradient of the input embeddings and gradients of the adapters."""
    embeds = torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(1)).to(model.dtype).requires_grad_(True)
    logits = model(inputs_embeds=embeds).logits
    (logits.float() ** 2).mean().backward()
    return [logits, embeds.grad, *(p.grad for n, p in model.named_parameters() if p.requires_grad)]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_outputs_and_gradients_equal_pefts(dtype, tolerance):
    plain = adapted(dtype)
    fused = copy.deepcopy(plain)
    assert fuse_lora(fused) == 6
    for a, b in zip(run(plain), run(fused), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, atol=tolerance * float(a.detach().abs().max()), rtol=tolerance)


def test_merging_disabling_and_unloading_still_work():
    model = adapted()
    fuse_lora(model)
    x = torch.randint(0, 300, (1, 5))
    with torch.no_grad():
        with_adapter = model(x).logits
        with model.disable_adapter():
            without = model(x).logits
        merged = model.merge_and_unload()(x).logits
    assert not torch.allclose(with_adapter, without)
    torch.testing.assert_close(merged, with_adapter, atol=1e-4, rtol=1e-4)


def test_under_autocast_peft_computes():
    model = adapted()
    fuse_lora(model)
    x = torch.randint(0, 300, (1, 5))
    with torch.autocast("cpu", torch.bfloat16):
        model(x).logits.float().sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora_" in n)


def test_layers_of_other_kinds_keep_pefts_computation():
    assert fuse_lora(adapted(lora_dropout=0.1)) == 0
    assert fuse_lora(adapted(use_dora=True)) == 0


class Cross(torch.nn.Module):
    """q of one input, k and v of another: named as siblings, but not called as such."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (torch.nn.Linear(6, n) for n in (4, 4, 8))

    def forward(self, x, memory):
        return torch.cat([self.q_proj(x), self.k_proj(memory), self.v_proj(memory)], -1)


def test_layers_named_as_siblings_with_other_inputs_compute_by_themselves():
    torch.manual_seed(0)
    plain = get_peft_model(Cross(), LoraConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj"]))
    for name, p in plain.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p)
    fused = copy.deepcopy(plain)
    assert fuse_lora(fused) == 3
    for turn in range(3):
        x, memory = torch.randn(5, 6), torch.randn(5, 6)
        found = []
        for model in (plain, fused):
            model.zero_grad()
            y = model(x, memory if turn else x)  # alike at first, so that they begin as a group
            (y**2).sum().backward()
            found.append([y, *(p.grad for p in model.parameters() if p.requires_grad)])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b)


def test_an_unused_sibling_has_no_gradient_and_is_not_kept():
    torch.manual_seed(0)
    model = get_peft_model(Cross(), LoraConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj"]))
    assert fuse_lora(model) == 3
    layers = model.base_model.model
    for _ in range(2):
        x = torch.randn(5, 6)
        (layers.q_proj(x).sum() + layers.v_proj(x).sum()).backward()
    assert torch.equal(layers.k_proj.lora_A["default"].weight.grad, torch.zeros(2, 6))
    assert float(layers.q_proj.lora_B["default"].weight.grad.abs().sum()) > 0
    y = layers.q_proj(torch.randn(5, 6))  # another input: what k had ready is gone
    assert torch.equal(layers.q_proj.lora_group[0]._input, layers.k_proj.lora_group[0]._input)
    assert y.shape == (5, 4)
