"""Finds the complete model folder behind what a user gives: a run folder, or a model folder itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mmllm.errors import UserError

NEEDED = ("config.json", "tokenizer_config.json", "processor_config.json")


def model_folder(path: str | Path) -> Path:
    """The folder with config, weights, tokenizer and processor.

    Args:
        path: a finished run of ``pretrain`` or ``tune`` (then its ``final/``), or a model folder.

    Raises:
        UserError: no such folder, a run of another stage or unfinished, another kind of model, or files missing.
    """
    from mmllm.train.run import final_folder

    folder = Path(path)
    if (folder / "run.json").is_file():
        folder = final_folder(folder, stages=("pretrain", "tune"))
    elif not folder.is_dir():
        raise UserError("no such folder", path, "give a run of mmllm pretrain or tune, or an exported model folder")
    kind = read_config(folder).get("model_type")
    if kind != "mmllm":
        raise UserError(f"this is a '{kind}' model, not one of mmllm", folder, "give a run of mmllm pretrain or tune")
    missing = [name for name in NEEDED if not (folder / name).is_file()]
    if not weight_files(folder):
        missing.append("model.safetensors")
    if missing:
        raise UserError(f"the model folder lacks {', '.join(missing)}", folder, "write it again with mmllm export")
    return folder


def read_config(folder: str | Path) -> dict[str, Any]:
    """The folder's ``config.json``.

    Raises:
        UserError: there is none, or it is not JSON.
    """
    file = Path(folder) / "config.json"
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError("no config.json here", folder, "give a run folder or a model folder") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise UserError("not valid JSON", file, "the folder is damaged; write it again") from None


def weight_files(folder: str | Path) -> list[Path]:
    """The safetensors files of a model folder, one or many; empty when the weights are missing or incomplete."""
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        files = [folder / name for name in names]
        return files if all(f.is_file() for f in files) else []
    single = folder / "model.safetensors"
    return [single] if single.is_file() else []


def saved_dtype(folder: str | Path) -> str:
    """The number format in which the LLM's weights are stored, from the files themselves.

    The config's ``dtype`` may be missing or older than the weights.
    """
    names = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
    for file in weight_files(folder):
        with file.open("rb") as f:  # safetensors: 8 bytes of header length, then the header as JSON
            header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
        for name, tensor in header.items():
            if name.startswith("language_model.") and tensor["dtype"] in names:
                return names[tensor["dtype"]]
    return "float32"


def check_servable(config: dict[str, Any], folder: str | Path) -> None:
    """Refuses what a server cannot do: it gives media to the LLM's input alone, without the words around them.

    Raises:
        UserError: a model with an injector, one that cuts pictures into tiles, or a connector that sees the question.
    """
    do = "answer with mmllm chat, or generate() of transformers"
    if config.get("injector"):
        raise UserError("vLLM cannot run layers that are injected into the LLM", folder, do)
    if config.get("tiling"):
        raise UserError("vLLM cannot be given the tiles of a picture yet", folder, do)
    for name in ("vision_connector", "audio_connector"):
        if (config.get(name) or {}).get("text_dim"):
            raise UserError("vLLM gives a connector no question to see", folder, do)


def modalities(config: dict[str, Any]) -> list[str]:
    """Which media a model takes: "image", "audio", both or none."""
    return [m for m, part in (("image", "vision_config"), ("audio", "audio_config")) if config.get(part)]
