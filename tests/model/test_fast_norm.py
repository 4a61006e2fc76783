"""RMSNorm with its backward written out computes what transformers' own does, and only where it may."""

import copy

import pytest
import torch
from tiny_mm import tiny_llm
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from mmllm.blocks.rms_norm import rms_norm
from mmllm.model.fast_norm import fuse_norms


def test_gradient_is_that_of_the_formula():
    torch.manual_seed(0)
    x, weight = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True), torch.randn(5, dtype=torch.float64)
    y = rms_norm(x, weight, 1e-3)
    torch.testing.assert_close(y, x / (x.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt() * weight)
    assert torch.autograd.gradcheck(lambda x: rms_norm(x, weight, 1e-3), x)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_outputs_and_gradients_equal_transformers(dtype, tolerance):
    torch.manual_seed(0)
    plain = tiny_llm()[0].to(dtype).requires_grad_(False)
    for name, p in plain.named_parameters():
        if "norm" in name:
            nn.init.normal_(p, 1, 0.2)
    fused = copy.deepcopy(plain)
    norms = sum(isinstance(m, LlamaRMSNorm) for m in plain.modules())
    assert fuse_norms(fused) == norms > 0
    found = []
    for model in (plain, fused):
        embeds = torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_(True)
        logits = model(inputs_embeds=embeds).logits
        (logits.float() ** 2).mean().backward()
        found.append((logits, embeds.grad))
    for a, b in zip(*found, strict=True):
        assert a.dtype == b.dtype == dtype
        torch.testing.assert_close(a, b, atol=tolerance * float(a.detach().abs().max()), rtol=tolerance)


def test_other_formulas_and_weights_that_train_are_left_alone():
    layers = nn.ModuleList([Qwen2RMSNorm(4), GemmaRMSNorm(4), nn.RMSNorm(4)])
    assert fuse_norms(layers) == 1
    x = torch.randn(3, 4)
    layers[0](x).sum().backward()
    assert layers[0].weight.grad is not None
