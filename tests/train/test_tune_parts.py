"""What a tune run may start from and what of it may train: LLaVA folders, parts of towers, settings of LoRA."""

import torch
from test_tune import config, moved, own_cache, tune, weights, world  # noqa: F401
from tiny_llava_kinds import save_llava

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
