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
