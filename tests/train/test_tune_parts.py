"""What a tune run may start from and what of it may train: LLaVA folders, parts of towers, settings of LoRA."""

import json

import pytest
import torch
from safetensors.torch import load_file
from test_tune import config, moved, own_cache, tune, weights, world  # noqa: F401
from tiny_llava_kinds import save_llava

from mmllm.errors import UserError
from mmllm.model import import_llava
from mmllm.serve.export_llava import export_llava


def test_a_llava_folder_is_tuned_and_goes_back(world, tmp_path):  # noqa: F811
    folder = save_llava(tmp_path / "llava")
    base = {"vision": {}, "audio": {}, "llm": None, "init": str(folder), "limit": 24}
    train = {"llm": "lora", "connector": "none", "max_steps": 3}
    run = tune("tune", config(world, **base, train=train, lora={"r": 2}), tmp_path / "run")
    start, _ = import_llava(folder, torch.float32)
    before = {k: v for k, v in start.state_dict().items()}
    assert moved(before, weights(run)) == {"language_model"}
    again, _ = import_llava(export_llava(run, tmp_path / "back"), torch.float32)
    torch.testing.assert_close(again.state_dict(), weights(run))


def test_only_blocks_before_the_layer_that_is_taken_train(world, tmp_path):  # noqa: F811
    folder = save_llava(tmp_path / "llava")  # takes the layer before the last of three
    base = {"vision": {}, "audio": {}, "llm": None, "init": str(folder), "limit": 24}
    train = {"connector": "none", "max_steps": 2}
    run = tune("tune", config(world, **base, train={**train, "vision": {"last_n": 2}}), tmp_path / "run")
    before, after = import_llava(folder, torch.float32)[0].state_dict(), weights(run)
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert changed and all(k.startswith("vision_tower.model.encoder.layers.1.") for k in changed), changed
    with pytest.raises(UserError, match="comes after it"):
        tune("tune", config(world, **base, train={**train, "vision": {"last_n": 1}}), tmp_path / "no")


VIT = {"model": "tiny:vit", "image_size": 32, "hidden_size": 24, "layers": 2, "heads": 2}
FROZEN = {"max_steps": 1, "learning_rate": 0.0, "weight_decay": 0.0}


@pytest.fixture(scope="module")
def start(world, tmp_path_factory):  # noqa: F811
    """The weights that every run here begins with."""
    out = tmp_path_factory.mktemp("start") / "run"
    return weights(tune("tune", config(world, vision={"tower": VIT}, limit=24, audio={}, train=FROZEN), out))


def changed(start, run):
    after = weights(run)
    assert set(start) == set(after)
    return {k for k in start if not torch.equal(start[k], after[k])}


def run_parts(world, out, train, **more):  # noqa: F811
    train = {"connector": "none", "max_steps": 2, **train}
    return tune("tune", config(world, vision={"tower": VIT}, limit=24, audio={}, train=train, **more), out)


def test_the_last_blocks_of_a_tower_train(world, start, tmp_path):  # noqa: F811
    moved = changed(start, run_parts(world, tmp_path / "run", {"vision": {"last_n": 1}}))
    assert {"vision_tower.norm.weight", "vision_tower.encoder.layers.1.linear1.weight"} <= moved
    assert all(k.startswith(("vision_tower.encoder.layers.1.", "vision_tower.norm.")) for k in moved)


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_in_a_tower_are_merged(world, start, tmp_path, dora):  # noqa: F811
    choice = {"lora": {"r": 2, "targets": ["linear2"], "dora": dora}}
    moved = changed(start, run_parts(world, tmp_path / "run", {"vision": choice}))
    assert moved == {f"vision_tower.encoder.layers.{k}.linear2.weight" for k in (0, 1)}


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_in_the_llm_are_merged(world, start, tmp_path, dora, capsys):  # noqa: F811
    lora = {"r": 2, "alpha": 4, "targets": ["q_proj", "mlp.down_proj"], "dora": dora}
    run = run_parts(world, tmp_path / "run", {"llm": {"lora": lora}})
    assert {k.split(".", 3)[-1] for k in changed(start, run)} == {
        f"{k}.{n}.weight" for k in (0, 1) for n in ("self_attn.q_proj", "mlp.down_proj")
    }
    saved = json.loads((run / "final" / "adapter" / "adapter_config.json").read_text())
    assert (saved["r"], saved["lora_alpha"], saved["use_dora"]) == (2, 4, dora)
    shown = capsys.readouterr().out
    assert "llm.lora" in shown and "Memory, about" in shown and "gradients 0.0 MB" in shown


def test_the_second_matrices_of_adapters_have_their_own_rate(world, tmp_path, capsys):  # noqa: F811
    def adapter(name: str, **more) -> dict[str, torch.Tensor]:
        train = {"llm": "lora", "learning_rate": 1e-3, "warmup_steps": 0, "weight_decay": 0.0, "max_steps": 1}
        run = run_parts(world, tmp_path / name, train, lora={"r": 2, "targets": ["q_proj"], **more})
        return load_file(run / "final" / "adapter" / "adapter_model.safetensors")

    plain, plus = adapter("plain"), adapter("plus", loraplus_lr_ratio=4)
    assert "llm.lora_B" in capsys.readouterr().out
    for name, value in plain.items():
        # At the first step B is zero, so A has no gradient, and Adam moves each number of B by its learning rate.
        torch.testing.assert_close(plus[name], value * 4 if "lora_B" in name else value)
        assert not ("lora_B" in name and (value == 0).all())


def test_the_last_layers_of_the_llm_train(world, start, tmp_path):  # noqa: F811
    moved = changed(start, run_parts(world, tmp_path / "run", {"llm": {"last_n": 1}}))
    assert "language_model.model.norm.weight" in moved
    assert all(k.startswith(("language_model.model.layers.1.", "language_model.model.norm.")) for k in moved)


@pytest.mark.parametrize(
    "train, more, words",
    [
        ({"vision": {"last_n": 3}}, {}, "2 blocks, not 3"),
        ({"vision": {"lora": {"targets": ["linear2", "linaer1"]}}}, {}, "linaer1"),
        ({"vision": {"first_n": 1}}, {}, "first_n"),
        ({"llm": {"last_n": 5}}, {}, "2 layers, not 5"),
        ({"llm": {"lora": {"targets": ["q_proj", "k_prj"]}}}, {}, "did you mean 'k_proj'"),
        ({"llm": {"lora": {"r": 4}}}, {"lora": {"r": 2}}, "twice"),
    ],
)
def test_choices_that_fit_nothing_are_told_in_one_line(world, tmp_path, train, more, words):  # noqa: F811
    with pytest.raises(UserError, match=words) as e:
        run_parts(world, tmp_path / "run", train, **more)
    assert "\n" not in str(e.value) and not (tmp_path / "run").exists()


def test_a_choice_is_one_key(world):  # noqa: F811
    for choice in ({"last_n": 1, "lora": {}}, {}):
        with pytest.raises(UserError, match="exactly one"):
            config(world, train={"llm": choice})
