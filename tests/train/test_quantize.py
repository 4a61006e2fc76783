"""QLoRA: 4-bit weights under adapters, merged to ordinary weights that compute the same, and its refusals."""

from importlib.util import find_spec

import pytest
import torch
from test_tune import config, moved, own_cache, tune, weights, world  # noqa: F401
from tiny_mm import tiny_llm

from mmllm.errors import UserError
from mmllm.model import load_model
from mmllm.train.quantize import ON_CPU, need_bitsandbytes, plain_llm, quantize_llm

installed = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed (mmllm[qlora])")
CPU = torch.device("cpu")


def test_without_bitsandbytes_it_is_told_in_one_line(world, tmp_path, monkeypatch):  # noqa: F811
    missing = lambda name, *_: None if name == "bitsandbytes" else find_spec(name)  # noqa: E731
    monkeypatch.setattr("importlib.util.find_spec", missing)
    with pytest.raises(UserError, match="not installed.*mmllm\\[qlora\\]") as e:
        tune("tune", config(world, llm_quantization="4bit", train={"llm": "lora"}), tmp_path / "run")
    assert "\n" not in str(e.value) and not (tmp_path / "run").exists()


@installed
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_told_in_one_line(monkeypatch):
    monkeypatch.delenv(ON_CPU, raising=False)
    with pytest.raises(UserError, match="want a GPU"):
        need_bitsandbytes()


@pytest.mark.parametrize(
    "train", [{"llm": "full"}, {"llm": {"last_n": 1}}, {"llm": "lora", "fsdp": True}], ids=["full", "last", "fsdp"]
)
def test_what_4_bits_cannot_do_is_refused(world, tmp_path, train):  # noqa: F811
    with pytest.raises(UserError, match="4 bits"):
        tune("tune", config(world, llm_quantization="4bit", train=train), tmp_path / "run")


@installed
def test_merged_weights_compute_what_the_quantized_llm_and_its_adapters_do():
    from peft import LoraConfig, get_peft_model

    llm, _ = tiny_llm()
    ids = torch.arange(40)[None]
    with torch.no_grad():
        full = llm(ids).logits
        assert quantize_llm(llm, torch.float32, CPU) == 14  # seven projections in two layers, not the head
        wrapped = get_peft_model(llm, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
        tuned = wrapped.eval()(ids).logits
        plain = plain_llm(wrapped, torch.float32)
        again = plain(ids).logits
    torch.testing.assert_close(again, tuned, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(full, tuned, atol=0.1)
    assert {type(m) for m in plain.modules() if isinstance(m, torch.nn.Linear)} == {torch.nn.Linear}
    assert set(plain.state_dict()) == set(tiny_llm()[0].state_dict())


@installed
def test_qlora_trains_adapters_over_weights_in_4_bits(world, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setenv(ON_CPU, "1")
    settings = {"llm_quantization": "4bit", "lora": {"r": 2}}
    frozen = {"learning_rate": 0.0, "weight_decay": 0.0, "max_steps": 1}
    start = tune("tune", config(world, **settings, train={"llm": "lora", **frozen}), tmp_path / "zero")
    run = tune("tune", config(world, **settings, train={"llm": "lora"}), tmp_path / "run")
    assert "82,176" in capsys.readouterr().out  # frozen numbers of the LLM, two to a byte
    before, after = weights(start), weights(run)
    changed = {k for k in before if k.startswith("language_model") and not torch.equal(before[k], after[k])}
    assert changed and all(k.split(".")[-2] in ("q_proj", "k_proj", "v_proj", "o_proj") for k in changed)
    assert (run / "final" / "adapter" / "adapter_model.safetensors").is_file() and load_model(run)
    assert "weight.absmax" not in " ".join(after)
