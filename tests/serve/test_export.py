"""An exported folder is complete, means the same as its source, and appears whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from mmllm.errors import UserError
from mmllm.model import load_model
from mmllm.serve import export
from mmllm.serve.export import export_model


def logits(folder):
    model, processor = load_model(folder, dtype=torch.float32)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 40, 3), np.uint8))
    wave = np.random.default_rng(1).standard_normal(9000).astype(np.float32)
    parts = [{"type": "image", "image": picture}, {"type": "audio", "audio": wave}, {"type": "text", "text": "What?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": parts}], tokenize=True, add_generation_prompt=True
    )
    with torch.no_grad():
        return model(**inputs).logits


def test_export_computes_the_same_by_the_auto_classes(tiny_folder, tmp_path):
    out = export_model(tiny_folder, tmp_path / "out")
    assert torch.equal(logits(out), logits(tiny_folder))
    from transformers import AutoModelForImageTextToText, AutoProcessor

    assert type(AutoModelForImageTextToText.from_pretrained(out)).__name__ == "MMLLMForConditionalGeneration"
    assert type(AutoProcessor.from_pretrained(out)).__name__ == "MMLLMProcessor"
    assert "AutoModelForImageTextToText" in (out / "README.md").read_text()
    assert not list(tmp_path.glob("*.part"))


def test_dtype_changes_the_llm_and_leaves_towers_in_float32(tiny_folder, tmp_path):
    out = export_model(tiny_folder, tmp_path / "out", dtype="bfloat16")
    before, after = load_file(tiny_folder / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        if name.startswith("language_model."):
            assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, before[name].bfloat16()), name
        else:
            assert torch.equal(tensor, before[name]), name
    model, _ = load_model(out, dtype="auto")
    assert model.language_model.dtype == torch.bfloat16
    assert model.get_parameter("vision_tower.norm.weight").dtype == torch.float32


def test_sharded_weights(tiny_folder, tmp_path):
    sharded = tmp_path / "sharded"
    shutil.copytree(tiny_folder, sharded)
    tensors = load_file(sharded / "model.safetensors")
    (sharded / "model.safetensors").unlink()
    names = sorted(tensors)
    table = {}
    for k, part in enumerate((names[::2], names[1::2])):
        file = f"model-0000{k + 1}-of-00002.safetensors"
        save_file({n: tensors[n] for n in part}, sharded / file, metadata={"format": "pt"})
        table |= dict.fromkeys(part, file)
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
    out = export_model(sharded, tmp_path / "out", dtype="float32")
    assert torch.equal(logits(out), logits(tiny_folder))


def test_refusals_leave_nothing_behind(tiny_folder, tmp_path, monkeypatch):
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="already exists"):
        export_model(tiny_folder, full)
    with pytest.raises(UserError, match="no adapter"):
        export_model(tiny_folder, tmp_path / "out", adapter=True)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(export.shutil, "disk_usage", lambda _: usage(10, 9, 1))
    with pytest.raises(UserError, match="make room"):
        export_model(tiny_folder, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full"]
    assert [p.name for p in full.iterdir()] == ["thesis.txt"]


def test_cut_off_in_the_middle_leaves_nothing(tiny_folder, tmp_path, monkeypatch):
    def cut(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "_write_weights", cut)
    with pytest.raises(KeyboardInterrupt):
        export_model(tiny_folder, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_command_line(tiny_folder, tmp_path, capsys):
    from mmllm.cli.main import main

    with pytest.raises(SystemExit) as end:
        main(["export", str(tiny_folder), "--out", str(tmp_path / "out"), "--dtype", "bfloat16"])
    assert end.value.code == 0 and (tmp_path / "out" / "model.safetensors").is_file()
    with pytest.raises(SystemExit) as end:
        main(["export", str(tmp_path / "nothing"), "--out", str(tmp_path / "two")])
    assert end.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
