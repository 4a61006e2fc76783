"""Model references: starter models are real, loadable and made once; other references are left alone or explained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmllm.data.models import resolve_dataset, resolve_model
from mmllm.errors import UserError


def test_smollm2_answers_and_is_plain_bf16(smollm2):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    config = json.loads((Path(smollm2) / "config.json").read_text())
    assert model.dtype == torch.bfloat16 and "quantization_config" not in config
    assert config["model_type"] == "llama" and config["tie_word_embeddings"]
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer) and int(answer[-1]) == tokenizer.eos_token_id


def test_smollm2_tokenizer_splits_digits_and_round_trips(smollm2):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    # The original's pieces: every digit alone, and runs of blank lines before a digit kept together.
    ids = tokenizer("x\n\n1234")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["x", "ĊĊ", "1", "2", "3", "4"]
    for text in ("<box>12,345,6,999</box>", " naïve 🙂  7", "a cat, a dog."):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer("<|im_start|>")["input_ids"] == [1] and tokenizer("<|im_end|>")["input_ids"] == [2]


def test_minilm_knows_what_is_alike(minilm):
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(minilm), AutoModel.from_pretrained(minilm).eval()
    batch = tokenizer(["a kitten", "a cat", "a truck"], padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state  # [3, T, 384]
    mask = batch["attention_mask"][..., None]
    x = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    assert x.shape == (3, 384) and x[0] @ x[1] > 0.6 > 0.4 > x[0] @ x[2]


def test_efficientnet_folder_holds_every_weight(efficientnet):
    from safetensors.torch import load_file

    config = json.loads((Path(efficientnet) / "config.json").read_text())
    state = load_file(Path(efficientnet) / "model.safetensors")
    assert config["model_type"] == "efficientnet_lite0"
    # 4,652,008 parameters; running means, variances and counters of the batch norms come on top.
    parameters = sum(v.numel() for k, v in state.items() if "running" not in k and "num_batches" not in k)
    assert parameters == 4_652_008 and state["_fc.weight"].shape == (1000, 1280)


def test_made_once_and_then_offline(smollm2):
    assert resolve_model("starter:smollm2-135m-instruct", offline=True) == smollm2


def test_other_references(tmp_path, monkeypatch):
    assert resolve_model(str(tmp_path)) == str(tmp_path.resolve())
    assert resolve_model("owner/name") == "owner/name"
    for wrong in ("/no/such/folder", "./nothing", "~/nothing-here", "runs/a/b/c"):
        with pytest.raises(UserError, match="no such model folder"):
            resolve_model(wrong)
    with pytest.raises(UserError, match="did you mean 'starter:smollm2-135m-instruct'"):
        resolve_model("starter:smollm2")
    monkeypatch.setenv("MMLLM_CACHE", str(tmp_path / "empty"))
    with pytest.raises(UserError, match="without --offline"):
        resolve_model("starter:efficientnet-lite0", offline=True)


def test_datasets(tmp_path, monkeypatch):
    monkeypatch.setenv("MMLLM_CACHE", str(tmp_path / "cache"))
    assert resolve_dataset(str(tmp_path)) == tmp_path.resolve()
    with pytest.raises(UserError, match="mmllm data build .*--size fast"):
        resolve_dataset("starter:fast")
    built = tmp_path / "cache" / "datasets" / "starter-fast"
    built.mkdir(parents=True)
    (built / "dataset.json").write_text("{}")
    assert resolve_dataset("starter:fast") == built
    with pytest.raises(UserError, match="did you mean 'starter:full'"):
        resolve_dataset("starter:ful")
    with pytest.raises(UserError, match="no such dataset folder"):
        resolve_dataset(tmp_path / "nothing")
