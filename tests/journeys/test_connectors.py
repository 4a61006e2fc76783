"""`mmllm pretrain`, `tune` and `eval` with each connector; seeing beats not seeing by the margins of a config."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import mmllm
from mmllm.data.build import build_dataset
from mmllm.data.chat_batches import record_media
from mmllm.data.records import read_records
from mmllm.report.figures import read_figures

pytestmark = pytest.mark.slow
CONFIGS = Path(mmllm.__file__).parents[1] / "configs" / "connectors"


def run(*args: str) -> None:
    done = subprocess.run([sys.executable, "-m", "mmllm.cli", *args], capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def texts(record: dict) -> list[str]:
    messages = [*record["messages"], *(m for b in record.get("branches") or [] for m in b)]
    return [part["text"] for m in messages for part in m["content"] if part["type"] == "text"]


def make_llm(folder: Path, words: list[str]) -> None:
    """Two million random weights, and a tokenizer that knows the starter's words, digits one by one."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    plain = Tokenizer(models.BPE())
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), bytes_])
    plain.decoder = decoders.ByteLevel()
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=marks, show_progress=False, initial_alphabet=alphabet)
    plain.train_from_iterator(words, trainer)
    tokenizer: Any = PreTrainedTokenizerFast(
        tokenizer_object=plain, bos_token=marks[0], eos_token=marks[2], pad_token=marks[2]
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=192, intermediate_size=576, num_hidden_layers=4, num_attention_heads=6,
        num_key_value_heads=6, max_position_embeddings=1024, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The fast starter's conversations about pictures, and the LLM."""
    source = build_dataset("starter.yaml", "fast")
    root, words = tmp_path_factory.mktemp("connectors"), []
    for stage in ("pretrain", "tune"):
        rows = []
        for record in read_records(source / stage / "train.jsonl"):
            parts = [p for m in record["messages"] for p in m["content"]]
            if any(kind != "image" for kind, _ in record_media(record)):
                continue
            for part in parts:
                if "path" in part:
                    part["path"] = os.path.abspath(part["path"])
            rows.append(json.dumps(record))
            words += texts(record)
        assert len(rows) >= 400, stage
        (root / f"{stage}.jsonl").write_text("\n".join(rows) + "\n")
    make_llm(root / "llm", words)
    return root


def road(connector: str, data: Path, folder: Path, limit: int, *overrides: str) -> dict:
    """pretrain, tune and eval with and without media; the figures by name."""
    pretrain, tune, where = folder / "pretrain", folder / "tune", [f"dataset={data}", *overrides]
    run("pretrain", str(CONFIGS / f"pretrain_{connector}.yaml"), *where, f"llm={data / 'llm'}", "--out", str(pretrain))
    run("tune", str(CONFIGS / f"tune_{connector}.yaml"), *where, f"init={pretrain}", "--out", str(tune))
    assert json.loads((tune / "final" / "config.json").read_text())["vision_connector"]["type"] == connector
    asked = ("--tasks", "pope,caption,side,box,interleaved", "--limit", str(limit), "--blind")
    run("eval", "--model", str(tune), "--data", "starter:fast", *asked)
    return {f.name: f for f in read_figures(tune / "eval" / "results.json")}


def test_what_is_seen_beats_what_is_guessed_by_the_stated_margin(data, tmp_path):
    figures = road("mlp", data, tmp_path, 60)
    stated = yaml.safe_load((CONFIGS / "tune_mlp.yaml").read_text())["margins"]
    assert "caption_recall_seen" in stated
    for name, margin in stated.items():
        over = figures[f"{name}_over_blind"]
        assert over.target == margin and over.verdict == "met", (name, margin, over.value, over.low)
        assert over.low is not None and over.low > 0, (name, over)


@pytest.mark.parametrize("connector", ["qformer", "perceiver"])
def test_connectors_that_do_not_learn_at_this_size_run_the_same_road(connector, data, tmp_path):
    figures = road(connector, data, tmp_path, 8, "train.max_steps=12", "train.warmup_steps=2")
    for name in ("pope_accuracy_seen", "caption_recall_seen", "side_accuracy_seen", "box_accuracy_iou50"):
        assert figures[name].value is not None and f"{name}_over_blind" in figures
