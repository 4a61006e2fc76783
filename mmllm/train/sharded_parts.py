"""What of a multimodal run does not go with shards, and the empty media that DeepSpeed's processes need."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from mmllm.errors import UserError
from mmllm.train.tune_config import TuneConfig


def check_parts(config: TuneConfig, injector: bool, deepspeed: bool, fsdp: bool) -> None:
    """Whether all processes will run the same modules in each step.

    Raises:
        UserError: a part that some processes would skip, and the others would wait for.
    """
    if config.kl_to_base and (deepspeed or fsdp):
        what = "kl_to_base runs the LLM once more in some processes only, and shards want it in all"
        raise UserError(what, "kl_to_base", "leave it out, or train without deepspeed and fsdp")
    if injector and deepspeed:
        what = "an injector is skipped by a process without media, and DeepSpeed wants it in all"
        raise UserError(what, "train.deepspeed", "use train.fsdp, or no injector")


def check_dtypes(trained: Iterable[nn.Parameter], bf16: bool) -> None:
    """Whether FSDP2 or ZeRO-3 can hold these parameters in one shard.

    Raises:
        UserError: they have several dtypes, as a whole LLM in bfloat16 and a connector in float32, and no mixed
            precision that would train float32 copies of all.
    """
    kinds = sorted({str(p.dtype).removeprefix("torch.") for p in trained})
    if len(kinds) > 1 and not bf16:
        what = f"shards want one dtype of all that trains, and here it is {' and '.join(kinds)}"
        raise UserError(what, "train", "set train.bf16: true, or dtype: float32")


@torch.no_grad()
def idle_media(model: Any, processor: Any) -> dict[str, dict[str, Tensor]]:
    """Model inputs of one black picture and one silent second, by modality; tower tokens where the tower is frozen."""
    made: dict[str, dict[str, Tensor]] = {}
    for name, field in (("vision", "image"), ("audio", "audio")):
        tower = getattr(model, f"{name}_tower")
        if tower is None:
            continue
        black, silent = Image.new("RGB", (224, 224)), np.zeros(16000, np.float32)
        inputs = processor.media_inputs(*(([black], []) if name == "vision" else ([], [silent])))[0]
        if not any(p.requires_grad for p in tower.parameters()):
            device = next(tower.parameters()).device
            found = tower(**{k: v.to(device) for k, v in inputs.items()})
            inputs = {f"{field}_tower_tokens": found.tokens.cpu()}
            if name == "audio":
                inputs["audio_tower_mask"] = found.mask.cpu()
        made[name] = inputs
    return made
