"""`mmllm pretrain|tune CONFIG --dry-run`: the run on meta tensors, what trains, its memory and sharding."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mmllm.align.folder import FILE as ALIGN_FILE
from mmllm.config import load_config
from mmllm.data.models import resolve_model
from mmllm.data.open import located_records
from mmllm.errors import UserError
from mmllm.model.meta import meta_folder, meta_llm, meta_model, meta_tower
from mmllm.train.memory import Memory, estimate_memory, print_memory
from mmllm.train.params import print_trainable
from mmllm.train.run import final_folder
from mmllm.train.shard_config import check_sharding
from mmllm.train.shard_memory import saved_by_4bit, shared_memory
from mmllm.train.sharded_parts import check_dtypes, check_parts
from mmllm.train.sharding import layer_classes
from mmllm.train.tune_config import MODALITIES, TuneConfig, check_quantization

NAMES = {"ddp": "whole in each process (DDP)", "fsdp2": "FSDP2"} | {f"zero{k}": f"DeepSpeed ZeRO-{k}" for k in range(4)}


def dry_run(stage: str, config_path: str, overrides: Any, processes: int) -> Memory:
    """Builds everything but data and weights, prints what would train, and returns the memory of each process.

    Raises:
        UserError: whatever in the config, the parts or the sharding would end the run before its first step.
    """
    config = load_config(config_path, overrides, TuneConfig)
    check_quantization(config)
    way = check_sharding(config.train)
    dtype = torch.float32 if config.dtype == "float32" else torch.bfloat16
    model = planned_model(config, dtype)
    check_sharding(config.train, layer_classes(model.language_model))
    from mmllm.train.tune_parts import adapt

    with torch.device("meta"):
        groups = adapt(model, config)
    sharded = way != "ddp" and processes > 1
    check_parts(config, model.injector is not None, sharded and way != "fsdp2", sharded and way == "fsdp2")
    if sharded and way in ("fsdp2", "zero3"):
        check_dtypes([p for g in groups for p in g.params], config.train.bf16)
    plain = {"deepspeed": None, "fsdp": None, "fsdp_config": None, "max_steps": config.train.max_steps or 1}
    with tempfile.TemporaryDirectory() as folder:
        config.train.to_arguments(folder, **plain)  # the other keys of `train`
    print(f"{stage}: {NAMES[way]}, {processes} process{'es' if processes > 1 else ''}", flush=True)
    print_trainable(model, groups, config.train.learning_rate)
    train = config.train
    rows, row = train.per_device_train_batch_size, config.max_length
    if config.pack is not None:
        row = 2048 if config.pack == "auto" else config.pack
    checkpointing = bool(train.model_dump().get("gradient_checkpointing"))
    held = estimate_memory(model, groups, train.optim, rows * row, row, rows, checkpointing)
    if config.llm_quantization:
        held = replace(held, weights=held.weights - saved_by_4bit(model.language_model))
    if sharded:
        held = shared_memory(held, model, groups, train.optim, way, processes, train.bf16)
    print_memory(held)
    rows *= train.gradient_accumulation_steps * processes
    print(f"{rows:,} rows of up to {row:,} tokens a step; {about_data(config)}", flush=True)
    print("dry run: nothing was loaded, nothing written", flush=True)
    return held


def planned_model(config: TuneConfig, dtype: torch.dtype) -> Any:
    """The model that the run would start from, on the meta device.

    Raises:
        UserError: a part whose config.json is not there.
    """
    from mmllm.train.tune_model import _llm, _parts

    init = Path(config.init) if config.init else None
    aligned = init is not None and ((init / ALIGN_FILE).is_file() or (init / "final" / ALIGN_FILE).is_file())
    if init is not None and not aligned:
        if not init.exists():
            raise UserError("no such folder", config.init, "give init, or init=null llm=... vision.tower=...")
        if config.llm or config.vision.tower or config.audio.tower:
            raise UserError("init brings LLM and towers already", config.init, "leave out llm and tower, or init")
        folder = final_folder(init, ["pretrain", "tune"]) if (init / "run.json").is_file() else init
        return meta_folder(folder, dtype)
    towers: dict[str, Any] = {}
    connectors: dict[str, Any] = {}
    for name in MODALITIES:
        section = getattr(config, name)
        if section.tower is None:
            tower, connectors[name] = _parts(name, section, str(init) if aligned else None)
            towers[name] = tower.to("meta") if tower is not None else None
            continue
        spec = {"model": section.tower} if isinstance(section.tower, str) else dict(section.tower)
        towers[name] = meta_tower({**spec, "model": resolve_model(str(spec.get("model", "")))}, name)
        connectors[name] = section.connector or None
    if not any(towers.values()):
        raise UserError("no tower", "config", "give init, or vision.tower or audio.tower")
    llm = meta_llm(resolve_model(_llm(config, init)), dtype)
    return meta_model(llm, towers, connectors, config.injector)


def about_data(config: TuneConfig) -> str:
    """How many records there are, where the dataset is a folder of this machine."""
    listed = config.data if isinstance(config.data, list) else [config.data]
    found = [Path(config.dataset) / (source if isinstance(source, str) else source.path) for source in listed]
    if not all(f.is_file() for f in found):
        return "the data is not here and was not looked at"
    return f"{sum(1 for s in listed for _ in located_records(s, None, Path(config.dataset))):,} conversations"
