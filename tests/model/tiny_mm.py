"""Tiny parts for tests of the multimodal LLM: a two-layer Llama with a byte-level tokenizer, and tiny towers."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mmllm.model import build_model
from mmllm.towers import load_tower

TEXT = [
    "user assistant system What is in the picture? Is there a cat? yes no a dog, a bell. Where is it?",
    "<box></box>",
]


def tiny_tokenizer(chatml=True):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", *(["<|im_start|>", "<|im_end|>"] if chatml else [])]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    end = "<|im_end|>" if chatml else "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, bos_token="<|endoftext|>", pad_token=end)


def tiny_llm(chatml=True, seed=0, tie=True):
    tokenizer = tiny_tokenizer(chatml)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=tie,
        initializer_range=0.2,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config).eval(), tokenizer


def tiny_towers(seed=0):
    torch.manual_seed(seed)
    vision = load_tower(
        {"model": "tiny:vit", "image_size": 32, "patch_size": 8, "hidden_size": 24, "layers": 1, "heads": 2}, "vision"
    )
    audio = load_tower({"model": "tiny:audio", "hidden_size": 16, "depth": 1}, "audio")
    return vision, audio


def tiny_model(chatml=True, connectors=None, seed=0, chat_template=None):
    vision, audio = tiny_towers(seed)
    connectors = connectors or {
        "vision": {"type": "grid_mlp", "hidden_dim": 32, "positions": True},
        "audio": {"type": "avg_pool", "stride": 4},
    }
    return build_model(
        tiny_llm(chatml, seed), vision, audio, connectors, dtype=torch.float32, chat_template=chat_template
    )
