"""LLMs with sentencepiece tokenizers: one is trained here, loaded through transformers and used as the LLM's."""

import pytest
import sentencepiece
import torch
from tiny_mm import tiny_towers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from mmllm.data.conversations import IGNORE, encode_conversation
from mmllm.model import build_model, load_model

SENTENCES = [
    "What is in the picture?",
    "a dog, a bell, a cat.",
    "Is there a cat? yes no",
    "User Assistant: where",
    "öäü",
]


@pytest.fixture(scope="module")
def llm_folder(tmp_path_factory):
    """A Llama folder whose only tokenizer file is a sentencepiece model."""
    folder = tmp_path_factory.mktemp("spm")
    text = folder / "text.txt"
    text.write_text("\n".join(SENTENCES * 20), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=330,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    text.unlink()
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "legacy": false}')
    vocabulary = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).vocab_size()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def test_tokenizer_agrees_with_sentencepiece_itself(llm_folder):
    tokenizer = AutoTokenizer.from_pretrained(llm_folder)
    original = sentencepiece.SentencePieceProcessor(model_file=f"{llm_folder}/tokenizer.model")
    for text in ("a dog, a bell.", "Is there a zebra?", "öl 7"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == original.encode(text)
        assert tokenizer.decode(ids) == text


def test_a_multimodal_model_over_it_learns_labels_generates_and_reloads(llm_folder, tmp_path):
    model, processor = build_model(llm_folder, *tiny_towers(), dtype=torch.float32)
    chat = [{"role": "user", "content": "Is there a cat?"}, {"role": "assistant", "content": "yes"}]
    row = encode_conversation({"messages": chat}, processor)
    learned = [t for t in row.labels if t != IGNORE]
    assert processor.tokenizer.decode(learned[:-1]).strip() == "yes" and learned[-1] == processor.tokenizer.eos_token_id
    batch = processor.apply_chat_template(chat[:1], tokenize=True, add_generation_prompt=True)
    assert row.input_ids[: batch["input_ids"].shape[1]] == batch["input_ids"][0].tolist()
    expected = model.generate(**batch, max_new_tokens=5)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, processor = load_model(tmp_path, torch.float32)
    assert torch.equal(again.generate(**batch, max_new_tokens=5), expected)
    assert processor.text_ids("a bell.<image>")[-1] == processor.image_token_id
