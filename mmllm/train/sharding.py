"""Sharded training: lets FSDP2 run on CPUs, and makes a sharded model whole again after its last step."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mmllm.config import find_config
from mmllm.errors import UserError
from mmllm.train.launch import is_main, world_size


@contextmanager
def shards_on_cpu(wanted: bool) -> Iterator[None]:
    """Within, an Accelerator made on CPU processes takes an FSDP plugin; accelerate alone passes over it in silence and
    trains with DDP."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    state = PartialState._shared_state
    on_cpu = state.get("distributed_type") == DistributedType.MULTI_CPU
    if wanted and on_cpu:
        state["distributed_type"] = DistributedType.MULTI_GPU  # the kind for which it looks at the plugin
    try:
        yield
    finally:
        if wanted and on_cpu and state.get("distributed_type") == DistributedType.MULTI_GPU:
            state["distributed_type"] = DistributedType.MULTI_CPU


def whole(tensor: Tensor) -> Tensor | None:
    """A sharded tensor on the CPU, whole, in process 0; None in the others. All processes must call it in one order."""
    from torch.distributed.tensor import DTensor

    held = tensor.detach()
    if isinstance(held, DTensor):
        held = held.full_tensor()
    elif hasattr(tensor, "ds_id"):
        from deepspeed import zero  # pyright: ignore[reportMissingImports]  (an extra)

        with zero.GatheredParameters([tensor]):
            return tensor.detach().to("cpu", copy=True) if is_main() else None
    return held.to("cpu", copy=True) if is_main() else None


def whole_state(model: nn.Module, names: set[str]) -> dict[str, Tensor]:
    """The named parameters and buffers, whole, in process 0; empty in the others. A collective call."""
    held = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    found = {n: whole(t) for n, t in held.items() if n in names}
    return {n: t for n, t in found.items() if t is not None}


def make_whole(model: nn.Module, dtypes: dict[str, torch.dtype]) -> nn.Module:
    """Turns a model that FSDP2 or DeepSpeed changed in place into an ordinary one on the CPU, as it was before.

    All processes must call it. Process 0 has the weights; the others' are empty (on torch's meta device).

    Args:
        dtypes: of the parameters before, by name; mixed precision changes them.
    """
    _reshard(model)
    new: dict[int, nn.Parameter] = {}
    for path, module in model.named_modules():
        for name, p in module._parameters.items():
            if p is None:
                continue
            if id(p) not in new:  # tied weights stay tied
                dtype = dtypes[f"{path}.{name}".lstrip(".")]
                full = whole(p)
                full = torch.empty(p.shape, dtype=dtype, device="meta") if full is None else full.to(dtype)
                new[id(p)] = nn.Parameter(full, requires_grad=p.requires_grad)
            module._parameters[name] = new[id(p)]
    _take_off(model)
    return model


def _reshard(model: nn.Module) -> None:
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _take_off(model: nn.Module) -> None:
    """Removes FSDP2's hooks and classes; torch has no call for it."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if not isinstance(module, FSDPModule):
            continue
        state: Any = module._get_fsdp_state()
        state._pre_forward_hook_handle.remove()
        state._post_forward_hook_handle.remove()
        module.__class__ = type(module).__mro__[2]  # FSDPX(FSDPModule, X)
        vars(module).pop("generate", None)  # an instance's own wrapper around the class's


def layer_classes(llm: Any) -> list[str]:
    """Class names of the LLM's decoder layers: the units that FSDP2 shards one by one."""
    from mmllm.model.injection import decoder_layers

    return sorted({type(layer).__name__ for layer in decoder_layers(llm)})


def on_one_process(values: dict[str, Any], say: Callable[[str], None] = print) -> dict[str, Any]:
    """TrainingArguments without sharding where there is one process: nothing to share, and the same numbers."""
    if world_size() > 1:
        return values
    asked = [k for k in ("deepspeed", "fsdp") if values.get(k)]
    if asked:
        say(f"one process: train.{asked[0]} has nothing to shard and is left out")
    return {k: v for k, v in values.items() if k not in ("deepspeed", "fsdp", "fsdp_config")}


def with_deepspeed(values: dict[str, Any]) -> dict[str, Any]:
    """TrainingArguments whose DeepSpeed config is found, also among the packaged ones, and can be run here.

    Raises:
        UserError: no such file, or DeepSpeed is not installed.
    """
    asked = values.get("deepspeed")
    if not asked:
        return values
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError("DeepSpeed is not installed", "train.deepspeed", "pip install 'mmllm[scale]'")
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return values | {"deepspeed": str(find_config(asked)) if isinstance(asked, str) else asked}


def check_sharded(asked: bool, got: bool) -> None:
    """Whether what was asked for is what accelerate made.

    Raises:
        UserError: FSDP was asked for and something else runs.
    """
    if asked and not got:
        raise UserError("FSDP was asked for, and accelerate did not take it", "train.fsdp", "see docs/scale.md")
