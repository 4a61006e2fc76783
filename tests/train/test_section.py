"""The section `train`: TrainingArguments names accepted, others refused with the nearest one."""

from __future__ import annotations

from typing import Literal

import pytest

from mmllm.config import StrictModel, dump_config, load_config, parse_config
from mmllm.errors import UserError
from mmllm.train.section import TrainSection


class StageTrain(TrainSection):
    connector: Literal["full", "none"] = "full"
    llm: Literal["none", "lora", "full"] = "lora"


class Stage(StrictModel):
    train: StageTrain = StageTrain()


def parse(**train):
    return parse_config({"train": train}, Stage, "stage.yaml").train


def test_declared_and_undeclared_arguments_reach_training_arguments(tmp_path):
    section = parse(max_steps=5, learning_rate=3e-4, adam_epsilon=1e-5, gradient_checkpointing=True, llm="none")
    args = section.to_arguments(tmp_path)
    assert (args.max_steps, args.learning_rate, args.adam_epsilon, args.gradient_checkpointing) == (5, 3e-4, 1e-5, True)
    assert args.output_dir == str(tmp_path) and args.report_to == []
    assert args.optim == "adamw_torch_fused"  # nine times faster than the plain one on a CPU


@pytest.mark.parametrize(
    "wrong, near",
    [
        ("learnig_rate", "learning_rate"),
        ("adam_epsilo", "adam_epsilon"),
        ("conector", "connector"),
        ("maxsteps", "max_steps"),
    ],
)
def test_unknown_key_names_the_nearest(wrong, near):
    with pytest.raises(UserError) as e:
        parse(**{wrong: 1})
    assert str(e.value) == f"stage.yaml: unknown key 'train.{wrong}'; did you mean '{near}'?"


@pytest.mark.parametrize("name", ["output_dir", "eval_strategy", "load_best_model_at_end", "remove_unused_columns"])
def test_arguments_that_would_have_no_effect_are_refused(name):
    with pytest.raises(UserError, match=f"unknown key 'train.{name}'"):
        parse(**{name: "x"})


@pytest.mark.parametrize(
    "key, value", [("max_steps", 0), ("learning_rate", "fast"), ("llm", "all"), ("save_total_limit", 0), ("threads", 0)]
)
def test_bad_values_name_their_key(key, value):
    with pytest.raises(UserError, match=f"stage.yaml: key 'train.{key}'"):
        parse(**{key: value})


def test_what_training_arguments_refuse_is_a_user_error(tmp_path):
    for wrong in ({"lr_scheduler_type": "wavy"}, {"optim": "adamm"}, {"save_strategy": "sometimes"}):
        with pytest.raises(UserError, match="train: "):
            parse(max_steps=1, **wrong).to_arguments(tmp_path)


def test_length_from_steps_or_epochs():
    assert parse(max_steps=5, num_train_epochs=3).steps(items=100) == 5
    section = parse(num_train_epochs=3, per_device_train_batch_size=10, gradient_accumulation_steps=2)
    assert section.steps(items=100) == 15 and section.steps(items=100, world=3) == 5
    with pytest.raises(UserError, match="set train.max_steps"):
        parse().steps(items=100)
    with pytest.raises(UserError, match="set train.max_steps"):
        section.steps()


def test_overrides_and_round_trip_through_a_file(tmp_path):
    (tmp_path / "a.yaml").write_text("train:\n  max_steps: 3\n  adam_epsilon: 1.0e-5\n")
    config = load_config(tmp_path / "a.yaml", ["train.ddp_timeout=60", "train.llm=full"], Stage)
    assert config.train.model_dump()["ddp_timeout"] == 60 and config.train.llm == "full"
    dump_config(config, tmp_path / "b.yaml")
    assert load_config(tmp_path / "b.yaml", [], Stage) == config


def test_phase_overrides_win(tmp_path):
    args = parse(max_steps=5, learning_rate=1e-3).to_arguments(tmp_path, max_steps=2, learning_rate=1e-2)
    assert (args.max_steps, args.learning_rate) == (2, 1e-2)
