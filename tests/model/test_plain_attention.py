"""Plain attention: eager's numbers and gradients, in any causal LM, and what is not plain goes the model's own way."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)
from transformers.models.llama.modeling_llama import eager_attention_forward

from mmllm.blocks.plain_attention import plain_attention
from mmllm.model.plain_attention import NAME

SIZE: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip


def heads(count, length, dtype, width=8):
    """As a model makes them: [B, L, H, D], seen as [B, H, L, D]."""
    return torch.randn(2, length, count, width).to(dtype).transpose(1, 2).requires_grad_()


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("masked", [True, False])
def test_numbers_and_gradients_are_those_of_eager(dtype, tolerance, masked):
    torch.manual_seed(0)
    q, k, v = heads(6, 5, dtype), heads(2, 7, dtype), heads(2, 7, dtype)
    mask = None
    if masked:
        mask = torch.zeros(2, 1, 5, 7, dtype=dtype)
        mask[..., 4:] = torch.finfo(dtype).min
        mask[1, :, 2, 1:] = torch.finfo(dtype).min
    module = types.SimpleNamespace(num_key_value_groups=3, training=True)
    ours = plain_attention(q, k, v, mask, 0.3).transpose(1, 2)
    theirs = eager_attention_forward(module, q, k, v, mask, 0.3)[0]
    outer = torch.randn_like(ours)
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    for mine, other in zip(
        torch.autograd.grad(ours, (q, k, v), outer), torch.autograd.grad(theirs, (q, k, v), outer), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)


def test_the_gradient_is_the_derivative():
    torch.manual_seed(0)
    q, k, v = (heads(n, 4, torch.float64, 3) for n in (4, 2, 2))
    mask = torch.zeros(1, 1, 4, 4, dtype=torch.float64).masked_fill(torch.ones(4, 4).triu(1).bool(), -1e9)
    assert torch.autograd.gradcheck(lambda q, k, v: plain_attention(q, k, v, mask, 0.7), (q, k, v))


@pytest.mark.parametrize("short", [1024, 2], ids=["short", "long"])
@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2"])
def test_a_causal_lm_gives_what_it_gives_with_eager(kind, short, monkeypatch):
    """Gemma 2 bends its scores, which is not plain; Mistral's window comes with the mask. Long rows go through SDPA."""
    monkeypatch.setattr("mmllm.model.plain_attention.SHORT_ROW", short)
    torch.manual_seed(0)
    made = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZE)),
        "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZE, sliding_window=3)),
        "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZE, attn_logit_softcapping=0.5)),
    }
    model = made[kind]()
    ids = torch.randint(0, 50, (2, 9))
    seen = torch.ones_like(ids)
    seen[1, :4] = 0
    labels = ids.masked_fill(seen == 0, -100)
    labels[1, 4] = -100  # predicted from padding, which sees nothing
    found = {}
    for name in ("eager", NAME):
        model.set_attn_implementation(name)
        model.zero_grad()
        out = model(input_ids=ids, attention_mask=seen, labels=labels)
        out.loss.backward()
        found[name] = out.logits[seen.bool()].detach(), [p.grad.clone() for p in model.parameters()]
        with torch.no_grad():
            found[name] += (model.generate(ids[:1], max_new_tokens=4, do_sample=False),)
    torch.testing.assert_close(found[NAME][0], found["eager"][0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[NAME][1], found["eager"][1], rtol=1e-3, atol=1e-6)
    assert torch.equal(found[NAME][2], found["eager"][2])


def test_under_autocast_it_computes_in_its_type():
    q, k, v = heads(4, 5, torch.float32), heads(2, 5, torch.float32), heads(2, 5, torch.bfloat16)
    module = torch.nn.Module()
    from mmllm.model.plain_attention import _forward

    with torch.autocast("cpu", torch.bfloat16):
        out = _forward(module, q, k, v, None, 0.3)[0]
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert q.grad is not None and q.grad.dtype == torch.float32
