"""transformers' Trainer under FSDP2 and DeepSpeed: checkpoints of what trains alone, and a whole model at the end."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import save_fsdp_optimizer
from transformers import Trainer

from mmllm.train.launch import is_main
from mmllm.train.sharding import check_sharded, layer_classes, make_whole, shards_on_cpu, whole_state


class ShardedTrainer(Trainer):
    """What of a trainer differs when weights or optimizer states are in shards.

    A subclass says which weights a checkpoint holds (``_state_names``), and writes and loads them whole (``_save``,
    ``_load_from_checkpoint``).
    """

    model: Any  # a wrapped one is known to type checkers only where DeepSpeed is installed, and wrongly
    model_wrapped: Any
    _dtypes: dict[str, torch.dtype] | None = None  # of all parameters before they were sharded

    def _state_names(self) -> set[str]:
        raise NotImplementedError

    def create_accelerator_and_postprocess(self) -> None:
        settings: Any = self.args.fsdp_plugin_args
        asked, llm = settings is not None, getattr(self.model, "language_model", None)
        if asked and llm is not None:
            settings.setdefault("transformer_cls_names_to_wrap", ",".join(layer_classes(llm)))
        with shards_on_cpu(asked or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"):
            super().create_accelerator_and_postprocess()
        check_sharded(asked, self.is_fsdp_enabled)

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        self._dtypes = {n: p.dtype for n, p in self.model.named_parameters()}  # type: ignore[union-attr]
        if self.is_fsdp_enabled and self.accelerator.mixed_precision != "no":
            for p in self.model.parameters():  # accelerate would do it, but after a checkpoint's weights were rounded
                p.data = p.data.float() if p.requires_grad else p.data
        sharded = None if self._native_format() else resume_from_checkpoint
        if sharded is not None:  # the weights go in while the model is whole, the optimizer's shards after it
            self._load_from_checkpoint(sharded)
            resume_from_checkpoint = None
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if sharded is not None:
            self._load_shards(sharded)
        return prepared

    def _free_model(self) -> None:
        """Takes off what accelerate has wrapped around the model (autocast, DDP), so that later use is plain.

        A model that was sharded is whole in process 0 alone, on the CPU.
        """
        vars(self.model_wrapped).pop("zero_grad", None)
        self.model = self.accelerator.unwrap_model(self.model_wrapped, keep_fp32_wrapper=False)
        if not self._native_format() and self._dtypes:
            make_whole(self.model, self._dtypes)
        self.model_wrapped = self.model
        self.accelerator.free_memory()

    @property
    def shards_weights(self) -> bool:
        """True under FSDP and ZeRO-3, where the weights themselves are shared between processes."""
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        return self.is_fsdp_enabled or (plugin is not None and plugin.zero_stage == 3)

    def _native_format(self) -> bool:
        """True when the weights are whole in this process; DeepSpeed and FSDP keep their own checkpoint formats."""
        return not (self.is_deepspeed_enabled or self.is_fsdp_enabled)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self._native_format():
            super().save_model(output_dir, _internal_call)
            return
        state = whole_state(self.model, self._state_names())
        if is_main():
            self._save(output_dir, state)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Shards keep their own format, without the frozen weights and, for FSDP, without those of ``save_model``."""
        if self._native_format():
            super()._save_optimizer_and_scheduler(output_dir)
            return
        if self.is_deepspeed_enabled:
            self.model_wrapped.save_checkpoint(output_dir, exclude_frozen_parameters=True)
        else:
            plugin = self.accelerator.state.fsdp_plugin
            save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if is_main():
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")  # type: ignore[union-attr]

    def _load_shards(self, folder: str) -> None:
        """What the optimizer held, into a model that is sharded already."""
        if self.is_deepspeed_enabled:
            self.model_wrapped.load_checkpoint(folder, load_module_strict=False)
        self._load_optimizer_and_scheduler(folder)
        self._load_scaler(folder)
