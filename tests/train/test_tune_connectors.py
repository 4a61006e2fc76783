"""Every connector, and the injector, through a real `mmllm pretrain` on tiny parts, and its model loaded again."""

import pytest
import torch
from test_tune import config, moved, own_cache, tune, turn, weights, world  # noqa: F401

from mmllm.errors import UserError
from mmllm.model import load_model

SMALL = {"hidden_dim": 16, "num_heads": 2}
KINDS = {
    "pixel_shuffle": {"type": "pixel_shuffle"},
    "adaptive_pool": {"type": "adaptive_pool", "rows": 2, "columns": 1},
    "perceiver": {"type": "perceiver", "num_latents": 3, **SMALL},
    "token_merge": {"type": "token_merge", "keep": 0.5},
    "c_abstractor": {"type": "c_abstractor", "rows": 2, "columns": 2, "hidden_dim": 16, "blocks": 1},
    "qformer": {"type": "qformer", "num_queries": 3, "num_layers": 2, "cross_every": 2, **SMALL},
}
TEXTUAL = {"type": "qformer", "num_queries": 3, "text_dim": "auto", **SMALL}
VIT = {"model": "tiny:vit", "image_size": 32, "hidden_size": 24, "layers": 1, "heads": 2}


def sections(world, connector, **changes):  # noqa: F811
    return config(world, vision={"tower": VIT, "connector": connector}, train={"max_steps": 3}, **changes)


def answer(run, world):  # noqa: F811
    model, processor = load_model(run)
    chat = [turn("user", {"type": "image", "path": str(world / "0.png")}, "Is it red?")]
    batch = processor.apply_chat_template(chat, tokenize=True, add_generation_prompt=True)
    model.generate(**batch, max_new_tokens=2)
    return model, processor


@pytest.mark.parametrize("name", KINDS)
def test_pretrain_trains_the_connector_alone_and_its_model_loads(world, tmp_path, name):  # noqa: F811
    run = tune("pretrain", sections(world, KINDS[name]), tmp_path / "run")
    model, processor = answer(run, world)
    assert model.vision_connector.kind == name
    grid = model.vision_tower.grid
    assert processor.image_seq_length == model.vision_connector.num_tokens(grid)


def test_a_query_transformer_that_sees_the_question(world, tmp_path):  # noqa: F811
    with pytest.raises(UserError, match="branches_per_row"):
        tune("pretrain", sections(world, TEXTUAL), tmp_path / "no")
    run = tune("pretrain", sections(world, TEXTUAL, branches_per_row=1), tmp_path / "run")
    model, _ = answer(run, world)
    assert model.takes_text and model.config.turn_token_ids


def test_an_injector_trains_and_can_be_given_to_a_trained_model(world, tmp_path):  # noqa: F811
    gated = {"type": "gated_cross_attention", "every": 2, "num_heads": 4}
    first = tune("pretrain", sections(world, KINDS["perceiver"]), tmp_path / "first")
    base = {"vision": {}, "audio": {}, "llm": None, "init": str(first)}
    given = config(world, injector={**gated, "in_place": True}, **base, train={"connector": "none", "max_steps": 3})
    second = tune("tune", given, tmp_path / "second")
    before, after = weights(first), weights(second)
    same = [k for k in before if torch.equal(before[k], after[k])]
    assert len(same) == len(before) and {k.split(".")[0] for k in set(after) - set(before)} == {"injector"}
    gates = [v for k, v in after.items() if k.endswith("gate")]
    assert gates and all(g.abs() > 0 for g in gates)
    model, processor = answer(second, world)
    assert model.injector.in_place and processor.image_seq_length == 3
    apart = tune("pretrain", sections(world, KINDS["perceiver"], injector=gated), tmp_path / "apart")
    model, processor = answer(apart, world)
    assert not processor.media_in_place and processor.image_seq_length == 1
    with pytest.raises(UserError, match="already"):
        tune("tune", config(world, injector=gated, **(base | {"init": str(second)})), tmp_path / "third")
