"""The pretrain and tune stages on tiny parts: what trains and what doesn't, resume, final folder, mistakes."""

import json
import shutil
import sys
import wave

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from tiny_mm import tiny_llm, tiny_towers

from mmllm.config import parse_config
from mmllm.data.chat_batches import ChatBatches
from mmllm.data.conversations import IGNORE
from mmllm.errors import UserError
from mmllm.model import build_model, load_model
from mmllm.train.tune import run_stage, tune
from mmllm.train.tune_config import TuneConfig

COLOURS = {"red": (200, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 200), "grey": (120, 120, 120)}


def turn(role, *parts):
    return {"role": role, "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny LLM folder and a data set of coloured squares with questions, and two beeps."""
    root = tmp_path_factory.mktemp("world")
    model, tokenizer = tiny_llm()
    model.save_pretrained(root / "llm")
    tokenizer.save_pretrained(root / "llm")
    records = []
    for i in range(24):
        name = list(COLOURS)[i % 4]
        Image.new("RGB", (32, 32), COLOURS[name]).save(root / f"{i}.png")
        branches = [[turn("user", f"Is it {c}?"), turn("assistant", "yes" if c == name else "no")] for c in COLOURS]
        records.append(
            {"id": f"p{i}", "messages": [turn("user", {"type": "image", "path": f"{i}.png"})], "branches": branches}
        )
    for i, pitch in enumerate((300, 1500)):
        tone = (8000 * np.sin(np.arange(8000) * pitch / 16000 * 2 * np.pi)).astype("<i2")
        with wave.open(str(root / f"{i}.wav"), "wb") as f:
            f.setnchannels(1)
            f.setsampwidth(2)
            f.setframerate(16000)
            f.writeframes(tone.tobytes())
        records.append(
            {
                "id": f"s{i}",
                "messages": [
                    turn("user", {"type": "audio", "path": f"{i}.wav"}, "What?"),
                    turn("assistant", ("a dog", "a bell")[i]),
                ],
            }
        )
    (root / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return root


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MMLLM_CACHE", str(tmp_path / "cache"))


def config(world, **changes):
    train = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_steps": 2,
        "threads": 1,
        "save_total_limit": 9,
        "learning_rate": 3e-3,
        **changes.pop("train", {}),
    }
    base = {
        "llm": str(world / "llm"),
        "dataset": str(world),
        "data": "train.jsonl",
        "dtype": "float32",
        "train": train,
        "vision": {"tower": {"model": "tiny:vit", "image_size": 32, "hidden_size": 24, "layers": 1, "heads": 2}},
        "audio": {"tower": {"model": "tiny:audio", "hidden_size": 16, "depth": 1}, "connector": {"type": "avg_pool"}},
    }
    return parse_config({**base, **changes}, TuneConfig)


def weights(run):
    return load_file(run / "final" / "model.safetensors")


def moved(a, b):
    return {k.split(".")[0] for k in a if not torch.equal(a[k], b[k])}


def test_pretrain_then_tune_trains_what_it_says_and_nothing_else(world, tmp_path, capsys):
    first = tune("pretrain", config(world), tmp_path / "p")
    assert "What trains" in capsys.readouterr().out
    start = tune(
        "pretrain", config(world, train={"max_steps": 1, "learning_rate": 0.0, "weight_decay": 0.0}), tmp_path / "zero"
    )
    assert moved(weights(start), weights(first)) == {"vision_connector", "audio_connector"}
    second = tune(
        "tune",
        config(
            world, init=str(first), llm=None, vision={}, audio={}, train={"llm": "lora", "max_steps": 12}, lora={"r": 2}
        ),
        tmp_path / "t",
    )
    before, after = weights(first), weights(second)
    changed = [k for k in before if not torch.equal(before[k], after[k])]
    assert {k.split(".")[0] for k in changed} == {"vision_connector", "audio_connector", "language_model"}
    llm = [k for k in changed if k.startswith("language_model")]
    assert llm and all(k.split(".")[-2] in ("q_proj", "k_proj", "v_proj", "o_proj") for k in llm)
    assert (second / "final" / "adapter" / "adapter_model.safetensors").is_file()
    model, processor = load_model(second)
    chat = [turn("user", {"type": "image", "path": str(world / "0.png")}, "Is it red?")]
    model.generate(**processor.apply_chat_template(chat, tokenize=True, add_generation_prompt=True), max_new_tokens=3)


def test_a_tower_trains_as_its_spec_says_and_is_saved_plain(world, tmp_path):
    vit = {"model": "tiny:vit", "image_size": 32, "hidden_size": 24, "layers": 1, "heads": 2}
    frozen = {"max_steps": 1, "learning_rate": 0.0, "weight_decay": 0.0}
    start = tune("pretrain", config(world, train=frozen), tmp_path / "zero")
    spec = {"tower": {**vit, "train": {"lora": {"r": 2, "targets": ["linear1"]}}}}
    run = tune("pretrain", config(world, vision=spec, train={"vision": "full"}), tmp_path / "run")
    before, after = weights(start), weights(run)
    assert set(before) == set(after)
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    tower = {k for k in changed if k.startswith("vision_tower")}
    assert tower == {"vision_tower.encoder.layers.0.linear1.weight"} and load_model(run)
    with pytest.raises(UserError, match="frozen by its own"):
        tune(
            "pretrain",
            config(world, vision={"tower": {**vit, "train": "none"}}, train={"vision": "full"}),
            tmp_path / "no",
        )


def test_training_lowers_the_loss_and_colours_are_learned(world, tmp_path):
    run = tune("tune", config(world, train={"llm": "full", "max_steps": 120, "learning_rate": 3e-3}), tmp_path / "t")
    losses = [row["loss"] for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "loss" in row]
    assert np.mean(losses[-10:]) < 0.25 * np.mean(losses[:5])


def test_resumed_run_ends_with_the_same_bits(world, tmp_path):
    settings = config(world, train={"llm": "lora"}, lora={"r": 2, "dropout": 0.1})
    whole = tune("tune", settings, tmp_path / "whole")
    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "final")
    for late in ("checkpoint-4", "checkpoint-6"):
        shutil.rmtree(cut / "checkpoints" / late)
    tune("tune", settings, cut, resume=True)
    assert moved(weights(whole), weights(cut)) == set()


def test_cached_tower_tokens_and_running_the_tower_give_the_same_loss(world, tmp_path):
    frozen = {"max_steps": 2, "learning_rate": 0.0, "weight_decay": 0.0}
    cached = tune("pretrain", config(world, train=frozen), tmp_path / "a")
    live = tune("pretrain", config(world, train={**frozen, "vision": "full", "audio": "full"}), tmp_path / "b")
    read = lambda run: [json.loads(x)["loss"] for x in (run / "metrics.jsonl").read_text().splitlines()[:2]]  # noqa: E731
    np.testing.assert_allclose(read(cached), read(live), rtol=2e-2)  # features may be kept in bfloat16


def test_batches_are_pure_and_every_record_comes_once_an_epoch():
    _, processor = build_model(tiny_llm(), *tiny_towers(), dtype=torch.float32)
    records = [
        {
            "id": str(i),
            "messages": [turn("user", "x" * (i % 7) * 9)],
            "branches": [[turn("user", f"{k}"), turn("assistant", "yes")] for k in range(5)],
        }
        for i in range(20)
    ]
    make = lambda: ChatBatches(records, processor, lambda m: {}, len, 4, 7, branches_per_row=2)  # noqa: E731
    a, b = make(), make()
    for step in (7, 2, 11):  # any order, any object: the same batch
        for key, value in a(step).items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(b(step)[key])), key
    epoch = [i for n in range(5) for i in a.rows(n)[0]]
    assert sorted(epoch) == list(range(20)) and epoch != [i for n in range(5, 10) for i in a.rows(n)[0]]
    assert {int(x) for n in range(5) for x in a(n)["branch_ids"].unique()} <= {-1, 0, 1, 2}
    assert a(3)["num_items"] == int((a(3)["labels"][:, 1:] != IGNORE).sum())
    both = [i for rank in (0, 1) for i in a.rows(2 * 0 + rank)[0]]
    assert len(set(both)) == 8, "two processes share no row"


@pytest.mark.parametrize(
    "changes, word",
    [
        ({"init": "nowhere"}, "no such folder"),
        ({"vision": {}, "audio": {}}, "no tower"),
        ({"audio": {}}, "no audio tower"),
        ({"train": {"connector": "none"}}, "nothing trains"),
        ({"train": {"llm": "lora"}, "lora": {"targets": ["q_prj"]}}, "q_prj"),
        ({"llm": None}, "no LLM"),
        ({"data": "other.jsonl"}, "other.jsonl"),
    ],
)
def test_mistakes_are_told_in_one_line(world, tmp_path, changes, word):
    with pytest.raises(UserError, match=word) as e:
        tune("tune", config(world, **changes), tmp_path / "x")
    assert "\n" not in str(e.value)


def test_unknown_keys_name_the_nearest(world, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump({"data": "train.jsonl", "dataset": str(world)}))
    for override, word in [
        ("lora.rr=3", "lora.rr"),
        ("train.max_step=3", "max_steps"),
        ("brnches_per_row=2", "branches"),
    ]:
        with pytest.raises(UserError, match=word):
            run_stage("tune", str(file), [override], tmp_path / "run", False)


@pytest.mark.slow
def test_two_processes_train_although_one_may_lack_sounds(world, tmp_path):
    """Batches of one row: one process has a picture while the other has a sound, and neither waits for the other."""
    import subprocess

    settings = config(world, train={"llm": "lora", "per_device_train_batch_size": 1, "max_steps": 13}, lora={"r": 2})
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(settings.model_dump(mode="json", exclude_none=True)))
    out = tmp_path / "run"
    command = [sys.executable, "-m", "mmllm.cli", "tune", str(file), "--nproc", "2", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (out / "final" / "model.safetensors").is_file()
    load_model(out)


def test_a_mistake_before_training_leaves_no_folder(world, tmp_path):
    """The run folder is written first; a start that cannot begin takes it away again."""
    settings = {"dataset": str(world), "data": "train.jsonl", "init": str(tmp_path / "no"), "train": {"max_steps": 1}}
    with pytest.raises(UserError, match="no such folder"):
        tune("pretrain", parse_config(settings, TuneConfig), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_weights_with_the_lowest_held_out_loss_become_the_result(world, tmp_path):
    """Held-out answers are the wrong ones: their loss rises as soon as colours are learned."""
    rows = (world / "train.jsonl").read_text().splitlines()[:9]
    swapped = [r.replace('"yes"', '"?"').replace('"no"', '"yes"').replace('"?"', '"no"') for r in rows]
    (world / "other.jsonl").write_text("\n".join(swapped) + "\n")
    train = {"llm": "full", "max_steps": 40, "save_steps": 10, "save_total_limit": 1}
    held_out = {"data": "other.jsonl", "take": "best"}
    run = tune("tune", config(world, train=train, held_out=held_out), tmp_path / "r")
    losses = {
        r["step"]: r["held_out_loss"]
        for r in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        if "held_out_loss" in r
    }
    assert sorted(losses) == [10, 20, 30, 40]
    best = min(losses, key=lambda s: losses[s])
    assert best != 40, losses
    kept = {p.name for p in (run / "checkpoints").iterdir()}
    assert kept == {f"checkpoint-{best}", "checkpoint-40"}
    saved = load_file(run / "checkpoints" / f"checkpoint-{best}" / "model.safetensors")
    final = weights(run)
    for name in saved:
        if name.startswith("vision_connector"):
            assert torch.equal(saved[name], final[name]), name
    with pytest.raises(UserError, match="nothere.jsonl"):
        tune("tune", config(world, held_out={"data": "nothere.jsonl"}), tmp_path / "n")
