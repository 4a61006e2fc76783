"""The pretrain and tune stages: conversations through towers, connectors and the LLM; only what trains differs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mmllm.config import load_config
from mmllm.errors import UserError
from mmllm.train.chat_data import ChatData, read_chat
from mmllm.train.tune_config import TuneConfig, check_quantization


def run_stage(stage: str, config_path: str, overrides: Any, out: Path | None, resume: bool) -> Path:
    """``mmllm pretrain`` or ``mmllm tune``; returns the run folder.

    Raises:
        UserError: see the config, the data, ``init`` and the run folder.
    """
    config = load_config(config_path, overrides, TuneConfig)
    return tune(stage, config, out or Path("runs") / Path(config_path).stem, resume)


def tune(stage: str, config: TuneConfig, out: Path, resume: bool = False) -> Path:
    """The stage on a ready config; see ``run_stage``."""
    from mmllm.data.models import resolve_dataset
    from mmllm.train.run import RunFolder

    folder = Path(resolve_dataset(config.dataset))
    about = folder / "dataset.json"
    sources = json.loads(about.read_text(encoding="utf-8")).get("sources", []) if about.is_file() else []
    run = RunFolder.open(out, stage, config, resume, seed=config.train.seed, sources=sources)
    if run.finished:
        print(f"{out}: already finished", flush=True)
        return out
    with run.begun():
        train_and_save(stage, config, run, folder)
    return out


def read_data(config: TuneConfig, folder: Path, rejected: Any) -> ChatData:
    """The conversations of a run, those that it replays among them; see ``read_chat``."""
    from mmllm.train.replay import mix_replay

    data = read_chat(config.data, folder, rejected, config.limit)
    if config.replay is None:
        return data
    files: Any = config.replay.data
    replay = read_chat(files, folder, rejected)
    mixed = mix_replay(data.records, replay.records, config.replay.weight, config.train.seed)
    if data.weights is None:  # a mixture draws its share anew in each epoch, else the same ones come each time
        replay = replay.only(mixed[len(data) :])
    return data.joined(replay, config.replay.weight)


def held_out_records(config: TuneConfig, folder: Path, rejected: Any) -> list[dict[str, Any]]:
    """The held-out records; none where they are not asked for."""
    if config.held_out is None:
        return []
    files: Any = config.held_out.data
    return read_chat(files, folder, rejected, config.held_out.limit).records


def train_and_save(stage: str, config: TuneConfig, run: Any, folder: Path) -> None:
    """Reads the data, makes the model, trains it and writes ``final/``; ``folder`` is the dataset's."""
    import torch
    from accelerate import PartialState
    from transformers import set_seed
    from transformers.utils import logging as hf_logging

    from mmllm.data.packing import PackedBatches
    from mmllm.data.rejected import Rejected
    from mmllm.report.figures import write_figures
    from mmllm.train.chat_media import ChatMedia
    from mmllm.train.held_out import HeldOutLoss
    from mmllm.train.launch import is_main, rank, set_threads
    from mmllm.train.memory import print_memory
    from mmllm.train.perplexity import Kept, figures, read_texts, told
    from mmllm.train.quantize import need_bitsandbytes, quantize_llm
    from mmllm.train.shard_config import check_sharding
    from mmllm.train.sharded_parts import check_dtypes, check_parts, idle_media
    from mmllm.train.token_count import TokenCount
    from mmllm.train.trainer import MMTrainer
    from mmllm.train.tune_model import check_template, fast_attention, make_batches, make_model, save_final
    from mmllm.train.tune_parts import adapt, keeping_hooks, tune_memory
    from mmllm.train.tune_rows import fitting

    check_sharding(config.train)
    check_quantization(config)
    if config.llm_quantization:
        need_bitsandbytes()
    hf_logging.disable_progress_bar()  # its bars break the plain lines of a log
    set_threads(config.train.threads)
    set_seed(config.train.seed)
    listed = "rejected.jsonl" if rank() == 0 else f"rejected-{rank()}.jsonl"
    rejected = Rejected(run.path / listed, config.max_rejected, "max_rejected")
    data = read_data(config, folder, rejected)
    trains = config.perplexity is not None and config.train.llm != "none"
    texts = read_texts(str(config.perplexity), folder) if trains else None
    dtype = choose_dtype(config, run)
    model, processor = make_model(config, dtype)
    check_template(config, data, processor)
    if config.llm_quantization:
        quantize_llm(model.language_model, dtype, torch.device(PartialState().device or "cpu"))
    fast_attention(model, config)
    groups = adapt(model, config)
    others = held_out_records(config, folder, rejected)
    media = ChatMedia(model, processor, [*data.records, *others], config)
    data, tokenised = fitting(data, processor, media, config, rejected)
    many = any(len(r.get("branches") or []) > 1 for r in data.records)
    if model.takes_text and config.branches_per_row != 1 and many:
        where, do = "branches_per_row", "set branches_per_row: 1"
        raise UserError("a connector that sees the question takes one question a row", where, do)
    if is_main():
        if left := rejected.count():
            print(f"{left:,} records left out, listed in {rejected.path}", flush=True)
        print(f"{len(data):,} conversations; LLM computes in {str(dtype).split('.')[-1]}", flush=True)
    batches, items = make_batches(config, data, processor, media, tokenised)
    count = TokenCount()
    print_memory(tune_memory(model, groups, config, batches))
    hooks = [count.hook(), *keeping_hooks(model, processor, config)]
    held_out = HeldOutLoss(model, others, processor, media, config) if others else None
    trainer = MMTrainer(
        model, batches, groups, config.train, run, items=items, hooks=hooks, held_out=held_out, unpack_batch=True
    )
    check_parts(config, model.injector is not None, trainer.is_deepspeed_enabled, trainer.is_fsdp_enabled)
    if trainer.shards_weights:
        check_dtypes([p for g in groups for p in g.params], config.train.bf16)
    if trainer.is_deepspeed_enabled:
        model.idle_media = idle_media(model, processor)
    kept = Kept(model, processor.tokenizer, texts, config.perplexity)
    trainer.fit()
    if config.held_out is not None and config.held_out.take == "best":
        best = trainer.load_best()
        if is_main():
            print(f"the weights of step {best} had the lowest held-out loss and are the result", flush=True)
    if is_main():
        mind = kept.finish()
        speed = count.report()
        if isinstance(batches, PackedBatches):
            speed["packing_fill"] = round(batches.fill, 4)
            print(f"packed rows of {batches.row_length:,} tokens were {batches.fill:.1%} full", flush=True)
        with run.final() as final:
            save_final(model, processor, final, dtype if config.llm_quantization else None)
            if mind:
                print(told(mind), flush=True)
                write_figures(final / "results.json", stage, config.train.seed, None, None, figures(mind))
        run.update(**speed, **({"perplexity": mind} if mind else {}))
        print(f"{stage}: model in {run.path / 'final'}", flush=True)
        if "tokens" in speed:
            rates = [f"{speed[k]:,.0f}" for k in ("tokens", "tokens_per_second", "tokens_per_cpu_second")]
            print(f"{rates[0]} LLM tokens, {rates[1]} a second, {rates[2]} a CPU-second", flush=True)


def choose_dtype(config: TuneConfig, run: Any) -> Any:
    """The LLM's dtype. A resumed run keeps the one it began with, and all processes take that of process 0."""
    import torch
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    from mmllm.blocks.compute import fast_dtype
    from mmllm.train.launch import is_main

    name = None
    if is_main():
        name = config.dtype if config.dtype != "auto" else run.info().get("llm_dtype")
        name = name or str(fast_dtype()).split(".")[-1]
        run.update(llm_dtype=name)
    if PartialState().num_processes > 1:
        held = [name]
        broadcast_object_list(held)
        name = held[0]
    return getattr(torch, str(name))
