"""The `train` section of a stage's config: TrainingArguments names, plus which parts of the model train."""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import ConfigDict, Field, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from mmllm.config import StrictModel
from mmllm.errors import UserError

if TYPE_CHECKING:
    from transformers import TrainingArguments

# The run folder, the data order and the end-of-run evaluation are ours; setting these here would have no effect.
_OURS = frozenset(
    "output_dir resume_from_checkpoint remove_unused_columns disable_tqdm ignore_data_skip do_train do_eval do_predict "
    "local_rank data_seed label_names label_smoothing_factor auto_find_batch_size load_best_model_at_end "
    "metric_for_best_model greater_is_better train_sampling_strategy length_column_name".split()
)
_OURS_PREFIXES = ("eval_", "per_device_eval", "dataloader_", "push_to_hub", "hub_")


@lru_cache
def argument_names() -> frozenset[str]:
    """Names of TrainingArguments that a config may set."""
    from transformers import TrainingArguments

    names = {f.name for f in dataclasses.fields(TrainingArguments)}
    return frozenset(n for n in names - _OURS if not n.startswith(_OURS_PREFIXES))


class TrainSection(StrictModel):
    """What a config's section ``train`` holds.

    The fields below are the usual ones, with our defaults; every other field of ``transformers.TrainingArguments``
    that makes sense here is accepted under its own name. A stage subclasses this and adds which parts train, such as
    ``connector: Literal["full", "none"] = "full"``; those fields never reach TrainingArguments.

    Attributes:
        max_steps: optimizer steps of the run (of a phase, where a stage has several); None: from num_train_epochs.
        learning_rate: the base rate; a parameter group may bring its own, scheduled in the same proportion.
        warmup_steps: a number of steps, or a fraction of all steps when below 1.
        prefetch: batches made ahead by a background thread; 0 makes them in the training thread. None: 2 or 4 beside a
            GPU (``loader_plan``), 0 on a CPU, where a second thread with its own OpenMP team slows the training thread.
        threads: CPU threads of each process; None: the cores this process may use, shared between local processes.
    """

    model_config = ConfigDict(extra="allow")
    own_fields: ClassVar[frozenset[str]] = frozenset({"prefetch", "threads"})

    max_steps: int | None = Field(default=None, ge=1)
    num_train_epochs: float | None = Field(default=None, gt=0)
    per_device_train_batch_size: int = Field(default=32, ge=1)
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    learning_rate: float = Field(default=1e-3, ge=0)
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = Field(default=0.05, ge=0)
    weight_decay: float = Field(default=0.01, ge=0)
    max_grad_norm: float = Field(default=1.0, ge=0)
    optim: str = "adamw_torch_fused"
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    adam_beta2: float = Field(default=0.98, ge=0, lt=1)
    bf16: bool = False
    seed: int = Field(default=0, ge=0)
    logging_steps: int = Field(default=20, ge=1)
    save_steps: int = Field(default=500, ge=1)
    save_total_limit: int | None = Field(default=2, ge=1)
    report_to: str | list[str] = "none"
    prefetch: int | None = Field(default=None, ge=0)
    threads: int | None = Field(default=None, ge=1)

    @classmethod
    def extra_keys(cls) -> frozenset[str]:
        """Valid keys beside the declared ones; the config loader names the nearest of them in its error."""
        return argument_names()

    @model_validator(mode="before")
    @classmethod
    def _reject_unknown(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        extra = [k for k in data if k not in cls.model_fields]
        wrong = [k for k in extra if k not in argument_names()]
        if wrong:
            # A ValidationError inside a validator keeps the key in its location, which a ValueError would not.
            kind = PydanticCustomError("extra_forbidden", "Extra inputs are not permitted")
            lines = [InitErrorDetails(type=kind, loc=(k,), input=data[k]) for k in wrong]
            raise ValidationError.from_exception_data(cls.__name__, lines)
        return data

    def steps(self, items: int | None = None, world: int = 1) -> int:
        """Optimizer steps of the run: ``max_steps``, or ``num_train_epochs`` over ``items`` training items.

        Raises:
            UserError: neither is set, or only epochs while the number of items is unknown.
        """
        if self.max_steps is not None:
            return self.max_steps
        if self.num_train_epochs is None or items is None:
            raise UserError("the length of the training is not set", "train", "set train.max_steps")
        per_step = self.per_device_train_batch_size * self.gradient_accumulation_steps * world
        return max(1, round(self.num_train_epochs * items / per_step))

    def to_arguments(self, output_dir: str | Path, items: int | None = None, **overrides: Any) -> TrainingArguments:
        """TrainingArguments for this section; ``overrides`` win over the section (a phase's own steps or rate).

        Raises:
            UserError: a value that TrainingArguments refuses, or an unknown length.
        """
        import torch
        from transformers import TrainingArguments

        from mmllm.train.launch import world_size
        from mmllm.train.sharding import on_one_process, with_deepspeed

        values = {k: v for k, v in self.model_dump().items() if k in argument_names() and k not in self.own_fields}
        values = with_deepspeed(on_one_process(values | overrides))
        if values.get("max_steps") is None:
            values["max_steps"] = self.steps(items, world_size())
        values.pop("num_train_epochs", None)
        if isinstance(self.report_to, str) and self.report_to != "none":
            values["report_to"] = [name.strip() for name in self.report_to.split(",")]
        # A NaN is reported with its step by MMTrainer; the filter would hide it and cost a device sync per step.
        values.setdefault("logging_nan_inf_filter", False)
        values.setdefault("use_cpu", not torch.accelerator.is_available())  # bf16 on a CPU wants this said
        try:
            args = TrainingArguments(
                output_dir=str(output_dir), disable_tqdm=True, remove_unused_columns=False, do_train=True, **values
            )
        except (ValueError, TypeError, ImportError, RuntimeError) as e:
            raise UserError(" ".join(str(e).split())[:300], "train", "mend this value in the config") from None
        # One process drives one device; several GPUs are used by --nproc, never by nn.DataParallel.
        args._n_gpu = min(args.n_gpu, 1)
        return args
