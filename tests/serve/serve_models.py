"""A tiny multimodal model that vLLM on CPU can run (its attention wants heads of at least 32)."""

from __future__ import annotations

from pathlib import Path

import torch


def tiny_llm(head_size: int = 32):
    """A two-layer Llama with large random weights (so that answers depend on every input) and a byte tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens, eos_token="<|im_end|>", extra_special_tokens=["<|im_start|>"]
    )
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=2 * head_size,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=head_size,
        tie_word_embeddings=True,
        initializer_range=0.2,
        max_position_embeddings=1024,
    )
    return LlamaForCausalLM(config), tokenizer


def save_tiny(folder: Path, image: bool = True, audio: bool = True, head_size: int = 32) -> Path:
    """A complete model folder of some 3 million random weights; 16 tokens a picture."""
    from mmllm.model import build_model
    from mmllm.towers import load_tower

    torch.manual_seed(0)
    model, processor = build_model(
        tiny_llm(head_size),
        vision_tower=load_tower({"model": "tiny:vit", "image_size": 32, "patch_size": 8}, "vision") if image else None,
        audio_tower=load_tower("tiny:audio", "audio") if audio else None,
        dtype=torch.float32,
    )
    louder(model)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def louder(model) -> None:
    """Scales fresh connectors up, so that answers depend on the media and a wrong picture would show."""
    with torch.no_grad():
        for connector in (model.vision_connector, model.audio_connector):
            for weight in connector.parameters() if connector is not None else ():
                weight *= 3
