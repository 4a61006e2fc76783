"""Writes a trained run as one complete Hugging Face folder that transformers and vLLM load as it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from mmllm.errors import UserError
from mmllm.serve.folder import modalities, model_folder, read_config, weight_files

DTYPES = ("float32", "bfloat16", "float16")
LLM_PREFIX = "language_model."
CARD = """---
library_name: transformers
pipeline_tag: image-text-to-text
tags: [mmllm]
---
# {name}

A multimodal LLM ({llm}{media}), made with mmllm.

```python
import mmllm.model  # registers the classes
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{name}")
processor = AutoProcessor.from_pretrained("{name}")
```

`mmllm chat {name}` talks with it, `mmllm serve {name}` serves it through vLLM.
"""


def export_model(model: str | Path, out: str | Path, dtype: str | None = None, adapter: bool = False) -> Path:
    """Copies a model folder, complete and self-contained, the LLM in another number format if asked.

    Towers and connectors stay float32, as everywhere in mmllm. Weights go file by file, so memory holds one file.

    Args:
        model: finished run of pretrain or tune, or a model folder. The weights of a run are already merged.
        out: new folder; it appears whole or not at all.
        dtype: of the LLM, one of ``DTYPES``; None keeps it.
        adapter: also copy the run's LoRA adapter (``adapter/``), for use on top of the untuned LLM.

    Raises:
        UserError: an unfit folder, ``out`` exists and is not empty, no adapter there, or too little disk space.
    """
    source, target = model_folder(model), Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError("this already exists", target, "give a new folder with --out")
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"unknown dtype '{dtype}'", do=f"one of {', '.join(DTYPES)}")
    if adapter and not (source / "adapter").is_dir():
        raise UserError(
            "this run has no adapter/", model, "only runs that tuned with LoRA have one; leave --adapter out"
        )
    files = weight_files(source)
    _check_space(target, sum(f.stat().st_size for f in files) * (2 if dtype == "float32" else 1))
    part = target.with_name(target.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        for file in sorted(source.iterdir()):
            if file.is_file() and file not in files and file.name != "model.safetensors.index.json":
                shutil.copy2(file, part / file.name)
        _write_weights(source, files, part, dtype)
        config = read_config(source)
        if dtype is not None:
            config["dtype"] = dtype
            if "dtype" in config.get("text_config", {}):
                config["text_config"]["dtype"] = dtype
            _write_json(part / "config.json", config)
        if adapter:
            shutil.copytree(source / "adapter", part / "adapter")
        (part / "README.md").write_text(_card(target.name, config), encoding="utf-8")
        if target.exists():
            target.rmdir()
        part.rename(target)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return target


def _write_weights(source: Path, files: list[Path], part: Path, dtype: str | None) -> None:
    """Copies the weight files, or rewrites them with the LLM's floating-point tensors in ``dtype``."""
    if dtype is None:
        for file in files:
            shutil.copy2(file, part / file.name)
    else:
        import torch
        from safetensors import safe_open
        from safetensors.torch import save_file

        wanted = getattr(torch, dtype)
        for file in files:
            tensors = {}
            with safe_open(str(file), framework="pt") as f:
                for name in f.keys():
                    tensor = f.get_tensor(name)
                    llm = name.startswith(LLM_PREFIX) and tensor.is_floating_point()
                    tensors[name] = tensor.to(wanted) if llm else tensor
            save_file(tensors, str(part / file.name), metadata={"format": "pt"})
    index = source / "model.safetensors.index.json"
    if index.is_file():
        table = json.loads(index.read_text(encoding="utf-8"))
        table["metadata"] = {
            **table.get("metadata", {}),
            "total_size": sum((part / f.name).stat().st_size for f in files),
        }
        _write_json(part / index.name, table)


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _check_space(target: Path, needed: int) -> None:
    parent = target.resolve().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < needed * 1.1:
        raise UserError(f"{needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free", parent, "make room there")


def _card(name: str, config: dict[str, Any]) -> str:
    llm = config.get("text_config", {}).get("model_type", "LLM")
    media = modalities(config)
    return CARD.format(name=name, llm=llm, media=f", takes text and {' and '.join(media)}" if media else "")
