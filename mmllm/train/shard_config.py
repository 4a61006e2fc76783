"""Looks through the DeepSpeed and FSDP2 settings of a run before anything is loaded: unknown and contradictory keys."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from mmllm.config import find_config
from mmllm.errors import UserError, unknown
from mmllm.train.section import TrainSection

# DeepSpeed passes over unknown keys at the top of its config in silence; these are all that it documents.
DEEPSPEED = frozenset(
    """train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps gradient_clipping optimizer scheduler
    communication_data_type seq_parallel_communication_data_type prescale_gradients gradient_predivide_factor
    gradient_allreduce_op sparse_gradients fp16 bf16 torch_autocast data_types zero_optimization
    zero_allow_untested_optimizer zero_force_ds_cpu_optimizer steps_per_print wall_clock_breakdown dump_state
    memory_breakdown flops_profiler activation_checkpointing checkpoint comms_logger compile aio disable_allgather
    dataloader_drop_last tensorboard wandb comet csv_monitor elasticity autotuning data_efficiency
    curriculum_learning sparse_attention compression_training hybrid_engine nebula use_data_before_expert_parallelism
    tensor_parallel timers pipeline seed""".split()
)
ZERO = frozenset(
    """stage contiguous_gradients reduce_scatter reduce_bucket_size use_multi_rank_bucket_allreduce allgather_partitions
    allgather_bucket_size overlap_comm load_from_fp32_weights elastic_checkpoint offload_param offload_optimizer
    sub_group_size cpu_offload cpu_offload_param cpu_offload_use_pin_memory ignore_unused_parameters legacy_stage1
    round_robin_gradients zero_hpz_partition_size zero_quantized_weights zero_quantized_nontrainable_weights
    zero_quantized_gradients memory_efficient_linear pipeline_loading_checkpoint override_module_apply
    log_trace_cache_warnings enable_sanity_checks leaf_module zenflow parameter_alignment compute_grad_norm
    save_muon_momentum_buffer_in_memory stage3_prefetch_bucket_size stage3_param_persistence_threshold
    stage3_model_persistence_threshold stage3_max_live_parameters stage3_max_reuse_distance
    stage3_gather_16bit_weights_on_model_save stage3_gather_fp16_weights_on_model_save stage3_allgather_sequential
    stage3_module_granularity_threshold stage3_use_all_reduce_for_fetch_params""".split()
)
FSDP1 = frozenset("forward_prefetch backward_prefetch use_orig_params sync_module_states limit_all_gathers".split())
FSDP = frozenset(
    """version cpu_offload auto_wrap_policy min_num_params transformer_layer_cls_to_wrap cpu_ram_efficient_loading
    state_dict_type activation_checkpointing reshard_after_forward""".split()
)
FORMATS = ("FULL_STATE_DICT", "SHARDED_STATE_DICT")


def check_sharding(section: TrainSection, layers: Iterable[str] | None = None) -> str:
    """Checks ``train.deepspeed`` or ``train.fsdp`` and says in which way the run shares its work.

    Args:
        layers: class names of the LLM's layers, for ``transformer_layer_cls_to_wrap``; None: not looked at.

    Returns:
        ``ddp``, ``zero0`` to ``zero3``, or ``fsdp2``.

    Raises:
        UserError: both at once, an unknown key, or a value that contradicts another or the section's.
    """
    values = section.model_dump()
    deepspeed, fsdp, settings = (values.get(k) for k in ("deepspeed", "fsdp", "fsdp_config"))
    if deepspeed and fsdp:
        raise UserError("deepspeed and fsdp are two ways of the same", "train", "leave one of them out")
    if deepspeed:
        return f"zero{check_deepspeed(read(deepspeed, 'train.deepspeed'), section)}"
    if fsdp:
        check_fsdp(read(settings or {}, "train.fsdp_config"), values, layers)
        return "fsdp2"
    if settings:
        raise UserError("fsdp_config has no effect without fsdp", "train.fsdp_config", "set train.fsdp: true")
    return "ddp"


def read(given: Any, where: str) -> dict[str, Any]:
    """The settings themselves, or those of a JSON file, also a packaged one.

    Raises:
        UserError: no such file, or no JSON object in it.
    """
    if isinstance(given, str):
        file = find_config(given)
        try:
            given = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as e:
            raise UserError(f"not JSON ({e})", file) from None
    if not isinstance(given, dict):
        raise UserError("neither a JSON file nor settings", where)
    return given


def known(settings: dict[str, Any], names: Iterable[str], where: str) -> None:
    for key in settings:
        if key not in set(names):
            raise unknown("key", key, names, where)


def check_deepspeed(settings: dict[str, Any], section: TrainSection) -> int:
    """Checks a DeepSpeed config beside the section's own values; returns its ZeRO stage.

    Raises:
        UserError: see ``check_sharding``.
    """
    where = "train.deepspeed"
    known(settings, DEEPSPEED, where)
    for key, ours in (("optimizer", "train.optim"), ("scheduler", "train.lr_scheduler_type")):
        if key in settings:
            raise UserError(f"'{key}' would take the place of the config's own", where, f"leave it out, set {ours}")
    extra = section.model_dump()
    same = {
        "train_micro_batch_size_per_gpu": section.per_device_train_batch_size,
        "gradient_accumulation_steps": section.gradient_accumulation_steps,
        "gradient_clipping": section.max_grad_norm,
    }
    on = {k: (settings.get(k) or {}).get("enabled", False) for k in ("bf16", "fp16")}
    for name, value in [*same.items(), ("bf16", section.bf16), ("fp16", bool(extra.get("fp16")))]:
        held = on[name] if name in on else settings.get(name, value)
        if held not in ("auto", value):
            raise UserError(f"'{name}' is {held}, and the config's train has {value}", where, 'write "auto"')
    zero = settings.get("zero_optimization") or {}
    known(zero, ZERO, f"{where}: zero_optimization")
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise UserError(f"there is no ZeRO stage {stage}", where, "give 1, 2 or 3")
    late = [k for k in zero if stage < 3 and (k.startswith("stage3_") or k == "offload_param")]
    if late:
        raise UserError(f"'{late[0]}' has no effect in stage {stage}", where, "leave it out, or set stage 3")
    return int(stage)


def check_fsdp(settings: dict[str, Any], values: dict[str, Any], layers: Iterable[str] | None) -> None:
    """Checks ``fsdp_config`` for FSDP2.

    Raises:
        UserError: see ``check_sharding``.
    """
    where = "train.fsdp_config"
    settings = {k.removeprefix("fsdp_"): v for k, v in settings.items()}
    old = [k for k in settings if k in FSDP1]
    if old or int(settings.get("version", 2)) != 2:
        what = f"'{old[0]}' is a setting of FSDP1" if old else f"this is FSDP{settings['version']}"
        raise UserError(what, where, "leave it out: version 2 is what runs here")
    known(settings, FSDP, where)
    if settings.get("activation_checkpointing"):
        do = "set train.gradient_checkpointing: true"
        raise UserError("activation_checkpointing renames the LLM's layers", where, do)
    if (form := settings.get("state_dict_type", FORMATS[0])) not in FORMATS:
        raise unknown("state_dict_type", str(form), FORMATS, where)
    asked = settings.get("transformer_layer_cls_to_wrap") or []
    for name in [asked] if isinstance(asked, str) else asked:
        if layers is not None and name not in set(layers):
            raise unknown("layer class", name, layers, f"{where}: transformer_layer_cls_to_wrap")
    if values.get("fp16"):
        raise UserError("fp16 with FSDP2 was never tried here", "train.fp16", "use bf16")
