"""One config on one process, DDP, FSDP2 and DeepSpeed ZeRO: the same losses, the same weights, resumed or not."""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from test_tune import config, moved, weights, world  # noqa: F401

from mmllm.config import parse_config
from mmllm.errors import UserError
from mmllm.model import load_model
from mmllm.train.sharded_parts import check_dtypes, check_parts
from mmllm.train.sharding import make_whole
from mmllm.train.tune_config import TuneConfig

AUTO = {k: "auto" for k in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")}
ZERO = {**AUTO, "gradient_clipping": "auto", "zero_allow_untested_optimizer": True, "bf16": {"enabled": "auto"}}
# All weights of stage 3 really are in shards: by default it keeps such small ones whole.
ZERO3 = {**ZERO, "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
WAYS = {
    "ddp": {},
    "fsdp2": {"fsdp": True, "fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"}},
    "zero2": {"deepspeed": {**ZERO, "zero_optimization": {"stage": 2}}},
    "zero3": {"deepspeed": ZERO3},
}
no_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed (mmllm[scale])")


def train(world, out, llm, nproc=2, **train_keys):  # noqa: F811
    """Six steps of three rows a process; two sounds among 26 records, so most batches lack one."""
    train = {"llm": llm, "per_device_train_batch_size": 3, "save_steps": 3, **train_keys}
    settings = config(world, train=train, lora={"r": 2})
    file = Path(f"{out}.yaml")
    file.write_text(yaml.safe_dump(settings.model_dump(mode="json", exclude_none=True)))
    command = [sys.executable, "-m", "mmllm.cli", "tune", str(file), "--nproc", str(nproc), "--out", str(out)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MMLLM_CACHE": str(out.parent / "cache")}
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    return out


def logged(run, key="loss"):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if "loss" in r] == list(range(1, 7))  # one process writes, once a step
    return [r[key] for r in rows if "loss" in r]


@pytest.fixture(scope="module")
def one(world, tmp_path_factory):  # noqa: F811
    """The same rows in one process: two micro-batches a step."""
    root = tmp_path_factory.mktemp("one")
    return {llm: train(world, root / llm, llm, 1, gradient_accumulation_steps=2) for llm in ("lora", "full")}


@pytest.mark.slow
@pytest.mark.parametrize(
    "way, llm",
    [
        ("ddp", "lora"),
        ("fsdp2", "full"),
        ("fsdp2", "lora"),
        pytest.param("zero2", "full", marks=no_deepspeed),
        pytest.param("zero3", "lora", marks=no_deepspeed),
    ],
)
def test_two_processes_train_as_one_and_resume_to_the_same_bits(world, one, tmp_path, way, llm):  # noqa: F811
    run = train(world, tmp_path / "run", llm, **WAYS[way])
    np.testing.assert_allclose(logged(run), logged(one[llm]), rtol=1e-5)
    np.testing.assert_allclose(logged(run, "grad_norm"), logged(one[llm], "grad_norm"), rtol=1e-4)
    mine, reference = weights(run), weights(one[llm])
    assert set(mine) == set(reference)
    for name in reference:
        torch.testing.assert_close(mine[name], reference[name], rtol=1e-4, atol=1e-5, msg=name)
    model, _ = load_model(run)
    assert not any(p.is_meta for p in model.parameters())
    assert (run / "final" / "adapter" / "adapter_model.safetensors").is_file() == (llm == "lora")
    cut = tmp_path / "cut"
    shutil.copytree(run, cut)
    shutil.rmtree(cut / "final")
    shutil.rmtree(cut / "checkpoints" / "checkpoint-6")
    train(world, cut, llm, **WAYS[way])
    assert logged(cut) == logged(run) and moved(weights(run), weights(cut)) == set()


@pytest.mark.slow
def test_fsdp2_in_mixed_precision_keeps_float32_copies_over_a_resumption(world, tmp_path):  # noqa: F811
    way = {"fsdp": True, "bf16": True, "gradient_checkpointing": True}
    run = train(world, tmp_path / "run", "full", **way)
    assert {t.dtype for t in weights(run).values()} <= {torch.float32, torch.int64}
    cut = tmp_path / "cut"
    shutil.copytree(run, cut)
    shutil.rmtree(cut / "final")
    shutil.rmtree(cut / "checkpoints" / "checkpoint-6")
    train(world, cut, "full", **way)
    assert logged(cut) == logged(run) and moved(weights(run), weights(cut)) == set()


def test_one_process_leaves_sharding_out(world, tmp_path, capsys):  # noqa: F811
    from mmllm.train.section import TrainSection

    args = TrainSection.model_validate({"max_steps": 1, "fsdp": True}).to_arguments(tmp_path)
    assert not args.fsdp and args.fsdp_plugin_args is None
    assert "nothing to shard" in capsys.readouterr().out


def test_what_does_not_go_with_shards_is_told_before_training(world):  # noqa: F811
    near = parse_config({"data": "x", "kl_to_base": 0.5}, TuneConfig)
    plain = parse_config({"data": "x"}, TuneConfig)
    for call in (
        lambda: check_parts(near, False, False, True),
        lambda: check_parts(near, False, True, False),
        lambda: check_parts(plain, True, True, False),
        lambda: check_dtypes([torch.nn.Parameter(torch.zeros(1, dtype=d)) for d in (torch.half, torch.float)], False),
    ):
        with pytest.raises(UserError) as e:
            call()
        assert "\n" not in str(e.value)
    check_parts(near, True, False, False)
    check_parts(plain, True, False, True)
    check_dtypes([torch.nn.Parameter(torch.zeros(1, dtype=d)) for d in (torch.half, torch.float)], True)


def test_deepspeed_that_is_not_there_is_told_in_one_line(world, tmp_path, monkeypatch):  # noqa: F811
    from mmllm.train.section import TrainSection

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if name == "deepspeed" else find_spec(name))
    with pytest.raises(UserError, match=r"not installed.*mmllm\[scale\]"):
        TrainSection.model_validate({"max_steps": 1, "deepspeed": ZERO3}).to_arguments(tmp_path)


def test_a_model_that_is_whole_stays_itself():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model[1].weight = model[0].weight  # tied
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    make_whole(model, {n: p.dtype for n, p in model.named_parameters()})
    assert model[0].weight is model[1].weight
    torch.testing.assert_close(dict(model.named_parameters()), before)
