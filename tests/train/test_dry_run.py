"""`--dry-run`: the shipped configs on a 7B shape without weights, its counts beside a real run's, and bad settings."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from test_tune import config, own_cache, tune, world  # noqa: F401
from transformers import CLIPVisionConfig, Qwen2Config

from mmllm.cli.main import main
from mmllm.errors import UserError
from mmllm.train.dry_run import dry_run, planned_model
from mmllm.train.memory import Memory
from mmllm.train.params import ParamGroup, count_parameters
from mmllm.train.section import TrainSection
from mmllm.train.shard_config import DEEPSPEED, ZERO, check_sharding
from mmllm.train.shard_memory import NF4, saved_by_4bit, shared_memory
from mmllm.train.tune_model import make_model
from mmllm.train.tune_parts import adapt

SCALE = Path(__file__).parents[2] / "configs" / "scale"
RUNS = sorted(p for p in SCALE.glob("*.yaml") if not p.name.startswith("accelerate"))
WAYS = {"pretrain_7b_fsdp2": "FSDP2", "tune_7b_fsdp2": "FSDP2", "tune_7b_zero3": "ZeRO-3", "tune_7b_qlora": "DDP"}
LLM = 7_615_616_512  # parameters of Qwen2.5-7B


@pytest.fixture(scope="module")
def seven(tmp_path_factory):
    """config.json of a 7B LLM and of a ViT-L, and nothing else."""
    root = tmp_path_factory.mktemp("seven")
    Qwen2Config(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, tie_word_embeddings=False,
    ).save_pretrained(root / "llm")  # fmt: skip
    CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
        patch_size=14,
    ).save_pretrained(root / "clip")  # fmt: skip
    return [f"llm={root / 'llm'}", "init=null", f"vision.tower={{model: {root / 'clip'}, layer: -2}}"]


@pytest.mark.parametrize("file", RUNS, ids=lambda p: p.stem)
def test_a_shipped_config_is_a_run_on_eight_gpus(file, seven, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    processes = 1 if "qlora" in file.stem else 8
    held = dry_run(file.stem.split("_")[0], str(file), seven, processes)
    said = capsys.readouterr().out
    assert WAYS[file.stem] in said and f"{LLM:,}" in said
    assert 5e9 < held.total < 80e9 and not any(tmp_path.iterdir())
    if "llm: full" in file.read_text():  # all that trains in float32 with Adam's two states, or 16 bytes a parameter
        assert held.gradients + held.optimizer == pytest.approx((12 if "fsdp" in file.stem else 14) / 8 * LLM, rel=0.01)


def test_the_command_prints_and_starts_nothing(seven, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as e:
        main(["pretrain", str(SCALE / "pretrain_7b_fsdp2.yaml"), *seven, "--nproc", "8", "--dry-run"])
    assert e.value.code == 0 and "nothing was loaded" in capsys.readouterr().out and not any(tmp_path.iterdir())


def by_part(model, groups):
    return {row.pop("part"): row for row in count_parameters(model, groups)}


@pytest.mark.parametrize("llm", ["none", "lora", "full"])
def test_what_is_planned_is_what_trains(world, tmp_path, llm):  # noqa: F811
    settings = config(world, train={"llm": llm, "vision": {"last_n": 1}}, lora={"r": 2})
    plan = planned_model(settings, torch.float32)
    with torch.device("meta"):
        planned = by_part(plan, adapt(plan, settings))
    real = make_model(settings, torch.float32)[0]
    rows = by_part(real, adapt(real, settings))
    # The two placeholder tokens are not planned: two rows of 64 tied numbers.
    rows["llm" if llm == "full" else "language_model"]["trainable" if llm == "full" else "frozen"] -= 128
    assert planned == rows and all(p.is_meta for p in plan.parameters())


def test_a_run_goes_on_from_a_folder_of_which_only_configs_are_there(world, tmp_path):  # noqa: F811
    first = tune("pretrain", config(world, train={"max_steps": 1}), tmp_path / "p")
    for file in (first / "final").glob("*.safetensors"):
        file.unlink()
    settings = config(world, init=str(first), llm=None, vision={}, audio={}, train={"llm": "lora"})
    plan = planned_model(settings, torch.float32)
    real = make_model(config(world), torch.float32)[0]
    assert {n: p.shape for n, p in plan.named_parameters()} == {n: p.shape for n, p in real.named_parameters()}


@pytest.mark.parametrize("stage, gigabytes", [(1, 31.4), (2, 16.6), (3, 1.88)])
def test_memory_of_zero_is_that_of_its_paper(stage, gigabytes, monkeypatch):
    """arXiv 1910.02054, figure 1: 7.5 billion parameters on 64 GPUs, Adam in mixed precision."""
    monkeypatch.setattr("mmllm.train.shard_memory.LIVE", 0)  # the paper leaves out what is gathered for a moment
    model = torch.nn.Linear(75_000, 100_000, bias=False, device="meta", dtype=torch.bfloat16)
    count = model.weight.numel()
    groups = [ParamGroup("all", [model.weight])]
    found = shared_memory(Memory(2 * count, 2 * count, 4 * count, 0), model, groups, "adamw", f"zero{stage}", 64, True)
    assert found.total / 1e9 == pytest.approx(gigabytes, rel=0.005)


def test_four_bits_are_those_of_the_paper():
    """arXiv 2305.14314, section 3: double quantization leaves 0.127 bits a parameter for the scales."""
    assert NF4 * 8 - 4 == pytest.approx(0.127, abs=5e-4)
    from tiny_mm import tiny_llm

    llm = tiny_llm()[0].requires_grad_(False).to(torch.bfloat16)
    linear = sum(p.numel() for n, p in llm.named_parameters() if "_proj" in n)
    assert saved_by_4bit(llm) == pytest.approx(linear * (2 - NF4), abs=20)


AUTO = {"train_micro_batch_size_per_gpu": "auto", "zero_optimization": {"stage": 2}}


@pytest.mark.parametrize(
    "train, word",
    [
        ({"deepspeed": AUTO, "fsdp": True}, "two ways"),
        ({"deepspeed": {"zero_optimisation": {"stage": 2}}}, "did you mean 'zero_optimization'"),
        ({"deepspeed": {"zero_optimization": {"stage": 2, "overlap_com": True}}}, "did you mean 'overlap_comm'"),
        ({"deepspeed": {"zero_optimization": {"stage": 4}}}, "no ZeRO stage 4"),
        ({"deepspeed": {"zero_optimization": {"stage": 2, "stage3_prefetch_bucket_size": 1}}}, "no effect in stage 2"),
        ({"deepspeed": {**AUTO, "train_micro_batch_size_per_gpu": 3}}, "is 3, and the config's train has 32"),
        ({"deepspeed": {**AUTO, "bf16": {"enabled": True}}}, "'bf16' is True"),
        ({"deepspeed": {**AUTO, "optimizer": {"type": "AdamW"}}}, "set train.optim"),
        ({"deepspeed": "configs/scale/zero4.json"}, "no such config file"),
        ({"fsdp": True, "fsdp_config": {"version": 1}}, "FSDP1"),
        ({"fsdp": True, "fsdp_config": {"use_orig_params": True}}, "FSDP1"),
        ({"fsdp": True, "fsdp_config": {"reshard_after_fwd": True}}, "did you mean 'reshard_after_forward'"),
        ({"fsdp": True, "fsdp_config": {"state_dict_type": "LOCAL_STATE_DICT"}}, "state_dict_type"),
        ({"fsdp": True, "fsdp_config": {"activation_checkpointing": True}}, "gradient_checkpointing"),
        ({"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": "GPT2Block"}}, "GPT2Block"),
        ({"fsdp_config": {"version": 2}}, "no effect without fsdp"),
    ],
)
def test_settings_of_sharding_that_are_wrong_are_told_in_one_line(train, word):
    with pytest.raises(UserError, match=word) as e:
        check_sharding(TrainSection.model_validate(train), ["LlamaDecoderLayer"])
    assert "\n" not in str(e.value)


def test_shipped_deepspeed_files_are_known():
    for stage in (2, 3):
        section = TrainSection.model_validate({"deepspeed": f"configs/scale/zero{stage}.json", "bf16": True})
        assert check_sharding(section) == f"zero{stage}"
        assert set(json.loads((SCALE / f"zero{stage}.json").read_text())) <= DEEPSPEED


def test_accelerate_reads_the_shipped_file():
    from accelerate.commands.config.config_args import load_config_from_file

    assert load_config_from_file(str(SCALE / "accelerate_8gpu.yaml")).num_processes == 8
    assert yaml.safe_load((SCALE / "accelerate_8gpu.yaml").read_text())["distributed_type"] == "MULTI_GPU"


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed (mmllm[scale])")
def test_our_list_of_zero_settings_is_deepspeeds(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    assert {f.alias or n for n, f in DeepSpeedZeroConfig.model_fields.items()} == ZERO
