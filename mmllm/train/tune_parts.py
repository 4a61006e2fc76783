"""What of a multimodal LLM trains in a tune run: connectors, injector, LLM and towers, whole, their last blocks, or by
low-rank adapters."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import nn

from mmllm.contracts import StepHook
from mmllm.data.chat_batches import record_media
from mmllm.errors import UserError, unknown
from mmllm.model import MMLLMForConditionalGeneration, MMLLMProcessor
from mmllm.model.fast_lora import fuse_lora
from mmllm.model.fast_norm import fuse_norms
from mmllm.model.injection import decoder_layers
from mmllm.towers.hf_vision import HFVisionTower
from mmllm.towers.training import apply_train
from mmllm.train.kl_to_base import KLToBase
from mmllm.train.memory import Memory, estimate_memory
from mmllm.train.params import ParamGroup, set_trainable
from mmllm.train.tune_config import LoraSection, TuneConfig

MODALITIES = ("vision", "audio")


def adapt(model: MMLLMForConditionalGeneration, config: TuneConfig) -> list[ParamGroup]:
    """Puts LoRA where wanted and freezes all that does not train; returns what does, in groups.

    Raises:
        UserError: nothing trains, LoRA's targets are not there, or more blocks are asked for than there are.
    """
    train, groups = config.train, []
    rate = train.learning_rates.get

    def part(name: str) -> list[nn.Parameter]:
        module = getattr(model, name)
        return list(getattr(module, "trainable", module.parameters)()) if module is not None else []

    if train.connector == "full":
        params = part("vision_connector") + part("audio_connector") + part("tile_rows")
        groups.append(ParamGroup("connector", params, rate("connector")))
    if train.injector == "full" and model.injector is not None:
        groups.append(ParamGroup("injector", list(model.injector.parameters()), rate("injector")))
    groups += llm_groups(model, config)
    fuse_norms(model.language_model)
    for name in MODALITIES:
        choice, tower = getattr(train, name), getattr(model, f"{name}_tower")
        if choice == "none":
            continue
        if isinstance(choice, dict) and tower is not None:
            if tower.trains is not None:
                raise UserError(f"the {name} tower's spec says already what trains", f"train.{name}", "say it once")
            apply_train(tower, choice)
        if tower is not None and not part(f"{name}_tower"):
            raise UserError(f"the {name} tower is frozen by its own 'train: none'", f"train.{name}")
        shown = f"{name}_tower.lora" if isinstance(choice, dict) and "lora" in choice else f"{name}_tower"
        params = reached(tower, part(f"{name}_tower"), name)
        groups.append(ParamGroup(shown, params, rate(name)))  # type: ignore[arg-type]
    if not any(g.params for g in groups):
        raise UserError("nothing trains", "train", "set connector: full or llm: lora")
    return set_trainable(model, groups)


def reached(tower: Any, params: list[nn.Parameter], name: str) -> list[nn.Parameter]:
    """Those parameters of a tower that its tokens depend on: not its pooler, nor blocks after the layer that is taken.

    The others would never move, and several processes would wait for their gradients. Only looked at in vision
    transformers of transformers and CNNs, which take a picture of a known size.

    Raises:
        UserError: none of them.
    """
    if not isinstance(tower, HFVisionTower) or tower.naflex or not params:
        return params
    tokens = tower(torch.zeros(1, 3, *tower._size())).tokens
    grads = torch.autograd.grad(tokens.float().sum(), params, allow_unused=True) if tokens.requires_grad else ()
    kept = [p for p, g in zip(params, grads) if g is not None]
    if not kept:
        what = f"the {name} tower gives layer {tower.layer}, and all that would train comes after it"
        raise UserError(what, f"train.{name}", "raise last_n, or take lora")
    return kept


def llm_groups(model: MMLLMForConditionalGeneration, config: TuneConfig) -> list[ParamGroup]:
    """The LLM's part of what trains, by ``train.llm``."""
    choice, rate = config.train.llm, config.train.learning_rates.get("llm")
    if choice == "full":
        return [ParamGroup("llm", list(model.language_model.parameters()), rate)]
    if choice == "lora":
        return lora_groups(model, config.lora, config.train.learning_rate if rate is None else rate)
    if choice == "none":
        return []
    if choice.lora is not None:
        if config.lora != LoraSection():
            raise UserError("LoRA's settings stand twice", "lora and train.llm.lora", "leave one of them out")
        return lora_groups(model, choice.lora, config.train.learning_rate if rate is None else rate)
    assert choice.last_n is not None
    return [ParamGroup("llm", last_layers(model.language_model, choice.last_n), rate)]


def last_layers(llm: Any, count: int) -> list[nn.Parameter]:
    """The last decoder layers, the norm after them, and the head where it is not the word embeddings.

    Raises:
        UserError: there are not so many.
    """
    layers = decoder_layers(llm)
    if count > len(layers):
        raise UserError(f"this LLM has {len(layers)} layers, not {count}", "train.llm.last_n")
    inside = {id(p) for layer in layers for p in layer.parameters()}
    last = {id(p) for layer in list(layers)[-count:] for p in layer.parameters()}
    words = {id(p) for p in llm.get_input_embeddings().parameters()}
    # Modules stand in the order in which they run, so what is registered after the layers comes after them.
    order = list(llm.parameters())
    end = max(i for i, p in enumerate(order) if id(p) in inside)
    return [p for i, p in enumerate(order) if id(p) in last or (i > end and id(p) not in words)]


def lora_groups(model: MMLLMForConditionalGeneration, lora: LoraSection, rate: float) -> list[ParamGroup]:
    """LoRA's parameters: one group, or those of B apart, with a learning rate of their own (LoRA+)."""
    params = add_lora(model, lora)
    if lora.loraplus_lr_ratio == 1:
        return [ParamGroup("llm.lora", params, rate)]
    inside = {id(p) for n, p in model.language_model.named_parameters() if ".lora_B." in n}
    others = [p for p in params if id(p) not in inside]
    second = [p for p in params if id(p) in inside]
    return [ParamGroup("llm.lora", others, rate), ParamGroup("llm.lora_B", second, rate * lora.loraplus_lr_ratio)]


def add_lora(model: MMLLMForConditionalGeneration, lora: LoraSection) -> list[nn.Parameter]:
    """Wraps the LLM with peft's LoRA; returns the adapters' parameters (float32).

    Raises:
        UserError: a target that no linear layer of the LLM is named by.
    """
    from peft import LoraConfig, get_peft_model

    check_targets(model.language_model, lora.targets)
    settings = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_dora=lora.dora,
        target_modules=lora.targets,
        task_type="CAUSAL_LM",
    )
    try:
        model.language_model = get_peft_model(model.language_model, settings)
    except ValueError as e:
        raise UserError(
            f"LoRA: {str(e).splitlines()[0][:200]}", "lora.targets", "name linear layers of this LLM"
        ) from None
    fuse_lora(model.language_model)
    return [p for n, p in model.language_model.named_parameters() if "lora_" in n]


def check_targets(llm: nn.Module, targets: list[str] | str) -> None:
    """Whether each target names a linear layer; peft itself passes over those that match nothing beside others.

    Raises:
        UserError: one does not; the error names the nearest that would.
    """
    from transformers.pytorch_utils import Conv1D

    names = [n for n, m in llm.named_modules() if isinstance(m, (torch.nn.Linear, Conv1D))]
    for target in [] if isinstance(targets, str) else targets:
        if not any(f".{name}".endswith(f".{target}") for name in names):
            raise unknown("LoRA target", target, {n.rsplit(".", 1)[-1] for n in names}, "lora.targets")


def tune_memory(
    model: MMLLMForConditionalGeneration, groups: list[ParamGroup], config: TuneConfig, batches: Any
) -> Memory:
    """The estimate for a run: rows as long as its longest tenth, or packed rows."""
    rows = config.train.per_device_train_batch_size
    lengths = np.minimum(batches.lengths, config.max_length)
    row = getattr(batches, "row_length", None) or int(np.quantile(lengths, 0.9)) + 1
    tiles, processor = batches.processor.tiles, batches.processor
    views = {"audio": lambda _: 1, "image": lambda source: tiles.views(processor.picture_grid(source)) if tiles else 1}
    media = [sum(views[kind](source) for kind, source in record_media(record)) for record in batches.records]
    pictures = math.ceil(rows * (sum(media) / len(media)) * max(row / max(lengths.mean(), 1), 1))
    checkpointing = bool(config.train.model_dump().get("gradient_checkpointing"))
    return estimate_memory(model, groups, config.train.optim, rows * row, row, pictures, checkpointing)


def keeping_hooks(
    model: MMLLMForConditionalGeneration, processor: MMLLMProcessor, config: TuneConfig
) -> list[StepHook]:
    """What holds the LLM near its base, by ``kl_to_base``.

    Raises:
        UserError: the LLM has no adapters, so its base is gone as soon as it trains.
    """
    if not config.kl_to_base:
        return []
    return [KLToBase(model, config.kl_to_base, [processor.image_token_id, processor.audio_token_id])]
