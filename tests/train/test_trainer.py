"""The training loop: exact resume after a kill, accumulation equal to the big batch, rates, hooks, clear failures."""

from __future__ import annotations

import json
import time

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from toy_stage import Noisy, train

from mmllm.contracts import StepHook
from mmllm.errors import UserError
from mmllm.train.batches import StepBatches
from mmllm.train.params import ParamGroup, set_trainable
from mmllm.train.run import RunFolder
from mmllm.train.section import TrainSection
from mmllm.train.trainer import MMTrainer


def weights(run):
    return load_file(run / "final" / "model.safetensors")


def assert_bit_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def assert_close(a, b, **tolerance):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], **tolerance, msg=lambda m, name=name: f"{name}: {m}")


def checkpoint_steps(run):
    return sorted(int(p.name.split("-")[1]) for p in (run / "checkpoints").glob("checkpoint-*[0-9]"))


def make(tmp_path, model, batch_fn, groups=None, name="run", hooks=(), **section):
    section = TrainSection.model_validate({"max_steps": 4, "threads": 1, "logging_steps": 1} | section)
    groups = groups or [("all", model.parameters(), None)]
    run = RunFolder.open(tmp_path / name, "toy", section, resume=True)
    return MMTrainer(model, batch_fn, set_trainable(model, groups), section, run, hooks=hooks)


def test_killed_run_resumes_to_the_same_bits(tmp_path, start_toy):
    train(tmp_path / "whole", {})
    child = start_toy(tmp_path / "killed", pause=0.1)
    deadline = time.monotonic() + 120
    while not (tmp_path / "killed/checkpoints/checkpoint-8").exists():
        assert child.poll() is None and time.monotonic() < deadline, child.communicate()[0]
        time.sleep(0.01)
    child.kill()
    assert child.wait() == -9
    assert not (tmp_path / "killed/final").exists()
    again = start_toy(tmp_path / "killed")
    assert again.wait() == 0, again.communicate()[0]

    summary = json.loads((tmp_path / "killed/final/summary.json").read_text())
    assert summary["resumed_from"] >= 8 and summary["steps"] == 20
    assert_bit_equal(weights(tmp_path / "whole"), weights(tmp_path / "killed"))
    assert weights(tmp_path / "killed")["queue.steps"] == 20
    steps = [json.loads(line)["step"] for line in (tmp_path / "killed/metrics.jsonl").read_text().splitlines()]
    assert steps == [5, 10, 15, 20]


def test_kill_while_a_checkpoint_is_written(tmp_path, start_toy):
    train(tmp_path / "whole", {})
    child = start_toy(tmp_path / "killed", die_in_save=12)
    assert child.wait() == -9
    assert checkpoint_steps(tmp_path / "killed") == [4, 8]  # 12 has weights, but was not complete
    assert list((tmp_path / "killed/checkpoints").glob("*.part"))
    train(tmp_path / "killed", {})
    assert not list((tmp_path / "killed").rglob("*.part"))
    assert_bit_equal(weights(tmp_path / "whole"), weights(tmp_path / "killed"))


def test_same_seed_same_bits_and_other_seed_other_bits(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(tmp_path / name, {"max_steps": 3, "seed": seed})
    assert_bit_equal(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not torch.equal(weights(tmp_path / "a")["head.weight"], weights(tmp_path / "c")["head.weight"])


def test_accumulation_equals_the_big_batch_for_every_parameter(tmp_path):
    """Pieces of 5 and 2 samples: only weighting by num_items gives the mean over all 7, for logit_scale too."""
    plain = {"noisy": False, "max_steps": 6, "max_grad_norm": 0.5}
    train(tmp_path / "big", plain)
    train(tmp_path / "pieces", plain | {"gradient_accumulation_steps": 2})
    assert_close(weights(tmp_path / "big"), weights(tmp_path / "pieces"), rtol=1e-4, atol=1e-6)
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("big", "pieces")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_matches_a_plain_loop(tmp_path):
    """The same AdamW steps written out by hand: two rates, decay on matrices only, clipping, warmup, cosine."""
    data = [(torch.randn(6, 8), torch.randn(6, 1)) for _ in range(5)]
    torch.manual_seed(0)
    ours, byhand = Noisy(False), Noisy(False)
    byhand.load_state_dict(ours.state_dict())
    groups = [("connector", list(ours.connector.parameters()), 1e-2), ("head", [*ours.head.parameters()], None)]
    trainer = make(
        tmp_path, ours, lambda i, r, w: {"x": data[i][0], "y": data[i][1]}, groups,
        max_steps=5, warmup_steps=2, weight_decay=0.1, learning_rate=1e-3, max_grad_norm=0.3,
    )  # fmt: skip
    trainer.fit()

    byhand.logit_scale.requires_grad_(False)
    c, h = byhand.connector[0], byhand.head
    optimizer = torch.optim.AdamW(
        [
            {"params": [c.weight], "lr": 1e-2, "weight_decay": 0.1},
            {"params": [c.bias], "lr": 1e-2, "weight_decay": 0.0},
            {"params": [h.weight], "lr": 1e-3, "weight_decay": 0.1},
            {"params": [h.bias], "lr": 1e-3, "weight_decay": 0.0},
        ],
        betas=(0.9, 0.98),
    )
    base = [g["lr"] for g in optimizer.param_groups]
    for step, (x, y) in enumerate(data):
        factor = step / 2 if step < 2 else 0.5 * (1 + torch.cos(torch.tensor((step - 2) / 3 * torch.pi)).item())
        for g, lr in zip(optimizer.param_groups, base):
            g["lr"] = lr * factor
        optimizer.zero_grad()
        byhand({"x": x, "y": y})["loss"].backward()
        nn.utils.clip_grad_norm_([p for p in byhand.parameters() if p.requires_grad], 0.3)
        optimizer.step()
    for name, p in byhand.named_parameters():
        torch.testing.assert_close(dict(ours.named_parameters())[name], p, rtol=1e-4, atol=1e-6, msg=name)


def test_checkpoint_holds_what_trains_and_buffers_only(tmp_path):
    train(tmp_path / "run", {"max_steps": 2})
    saved = load_file(tmp_path / "run/checkpoints/checkpoint-2/model.safetensors")
    assert "connector.0.weight" in saved and "connector.1.running_mean" in saved and "queue.steps" in saved
    assert not any(name.startswith("tower") for name in saved)
    for file in (tmp_path / "run/checkpoints/checkpoint-2").glob("*.p*"):
        # Nothing in a checkpoint needs an unrestricted unpickler (the random states are plain numbers and arrays).
        from transformers.trainer_pt_utils import safe_globals

        with safe_globals():
            torch.load(file, weights_only=True)
    assert not (tmp_path / "run/checkpoints/checkpoint-2/training_args.bin").exists()


def test_frozen_weights_stay(tmp_path):
    torch.manual_seed(0)
    before = Noisy(True).tower.weight.clone()
    train(tmp_path / "run", {"max_steps": 3})
    after = weights(tmp_path / "run")
    assert torch.equal(before, after["tower.weight"])


def test_a_part_left_in_eval_mode_trains_with_its_dropout(tmp_path):
    """A new module is in training mode whatever the parts that it is made of are in."""

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 1)).eval()
            self.modes = []

        def forward(self, batch):
            self.modes.append(self.part[0].training)
            return {"loss": self.part(batch["x"]).square().mean()}

    model = Wrapped()
    make(tmp_path, model, lambda step, rank, world: {"x": torch.ones(4, 8)}).fit()
    assert model.modes == [True] * 4


def test_also_save_keeps_a_frozen_teacher(tmp_path):
    """A moving average has no gradient, yet a resumed run needs it."""

    class Teacher(nn.Module):
        def __init__(self):
            super().__init__()
            self.student, self.teacher = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, batch):
            with torch.no_grad():
                self.teacher.weight.lerp_(self.student.weight, 0.5)
            return {"loss": self.student(batch["x"]).square().mean()}

    def run(model, also_save):
        section = TrainSection(max_steps=2, threads=1)
        folder = RunFolder.open(tmp_path / f"run{len(also_save)}", "toy", section, resume=True)
        groups = set_trainable(model, [("student", model.student.parameters(), None)])
        batch = {"x": torch.ones(1, 2)}
        MMTrainer(model, lambda i, r, w: batch, groups, section, folder, also_save=also_save).fit()
        return model

    for also_save, same in (((), False), (("teacher.",), True)):
        torch.manual_seed(0)
        first = run(Teacher(), also_save)
        torch.manual_seed(0)
        resumed = run(Teacher(), also_save)
        assert torch.equal(first.teacher.weight, resumed.teacher.weight) is same


def test_phases_run_after_one_another_and_are_not_run_twice(tmp_path):
    def both(trained):
        torch.manual_seed(0)
        model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
        section = TrainSection(max_steps=3, threads=1, logging_steps=1)
        run = RunFolder.open(tmp_path / "run", "toy", section, resume=True)

        class Both(nn.Module):
            def __init__(self):
                super().__init__()
                self.parts = model

            def forward(self, batch):
                trained.append(batch["phase"])
                return {"loss": self.parts["b"](self.parts["a"](batch["x"])).square().mean()}

        whole = Both()
        for phase, steps in (("a", 2), ("b", 3)):
            batch = {"x": torch.ones(1, 2), "phase": phase}
            groups = set_trainable(whole, [(phase, model[phase].parameters(), None)])
            MMTrainer(whole, lambda i, r, w, b=batch: b, groups, section, run, phase=phase, max_steps=steps).fit()
        return model, run

    trained: list = []
    first, run = both(trained)
    assert trained == ["a"] * 2 + ["b"] * 3
    assert [(r["phase"], r["step"]) for r in run.read_metrics()] == [("a", 1), ("a", 2), ("b", 1), ("b", 2), ("b", 3)]
    again, _ = both(trained)
    assert len(trained) == 5  # nothing ran again, and the weights came back
    assert_bit_equal(first.state_dict(), again.state_dict())


def test_resume_refuses_a_checkpoint_of_another_model(tmp_path):
    small, big = nn.Linear(2, 2), nn.Linear(2, 3)
    batch = {"x": torch.ones(1, 2)}

    class Wrap(nn.Module):
        def __init__(self, inner, **parts):
            super().__init__()
            self.inner = inner
            for name, part in parts.items():
                setattr(self, name, part)

        def forward(self, batch):
            return {"loss": self.inner(batch["x"]).square().mean()}

    make(tmp_path, Wrap(small), lambda i, r, w: batch, max_steps=2).fit()
    with pytest.raises(UserError, match=r"inner\.(weight|bias)' is \(2.*\(3"):
        make(tmp_path, Wrap(big), lambda i, r, w: batch, max_steps=2).fit()
    with pytest.raises(UserError, match="lacks 'projector"):  # the resumed LoRA run that lost its projector
        make(tmp_path, Wrap(small, projector=nn.Linear(2, 2)), lambda i, r, w: batch, max_steps=2).fit()


def test_a_loss_that_is_not_a_number_stops_with_its_step(tmp_path):
    class Bad(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(1))

        def forward(self, batch):
            return {"loss": (self.w * batch["x"]).sum()}

    values = [1.0, 1.0, float("nan"), 1.0]
    with pytest.raises(UserError, match="step 3: the loss is nan"):
        make(tmp_path, Bad(), lambda i, r, w: {"x": torch.tensor([values[i]])}).fit()


def test_a_checkpoint_that_cannot_be_written_leaves_nothing(tmp_path):
    section = TrainSection(max_steps=2, threads=1)
    run = RunFolder.open(tmp_path / "run", "toy", section)
    model = Noisy(False)
    groups = set_trainable(model, [("head", model.head.parameters(), None)])

    class Full(MMTrainer):
        def _save_rng_state(self, output_dir):
            raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"cannot write a checkpoint \(No space left on device\); make room"):
        Full(model, lambda i, r, w: {"x": torch.ones(2, 8), "y": torch.ones(2, 1)}, groups, section, run).fit()
    assert not list(run.checkpoints().iterdir())


def test_hooks_are_called_in_order_and_vector_losses_are_averaged(tmp_path):
    calls = []

    class Watch(StepHook):
        def before_forward(self, model, batch, step):
            calls.append(("before_forward", step))

        def after_loss(self, model, batch, losses, step):
            calls.append(("after_loss", step, tuple(losses["loss"].shape)))

        def after_backward(self, model, step):
            assert model.w.grad is not None
            calls.append(("after_backward", step))

        def before_optimizer_step(self, model, step):
            calls.append(("before_optimizer_step", step))

    class Vector(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(3))

        def forward(self, batch):
            return {"loss": self.w * batch["x"]}

    trainer = make(
        tmp_path, Vector(), lambda i, r, w: {"x": torch.tensor([1.0, 2.0, 6.0])},
        hooks=[Watch()], max_steps=1, gradient_accumulation_steps=2, max_grad_norm=0.0, learning_rate=0.0,
    )  # fmt: skip
    assert trainer.fit()["loss"] == pytest.approx(3.0)
    one = [("before_forward", 0), ("after_loss", 0, (3,)), ("after_backward", 0)]
    assert calls == one + one + [("before_optimizer_step", 0)]


def test_named_terms_are_averaged_between_logs(tmp_path):
    class Terms(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(1))

        def forward(self, batch):
            return {"loss": self.w.sum() + batch["x"], "contrast": batch["x"] * 2, "text": "ignored"}

    trainer = make(tmp_path, Terms(), lambda i, r, w: {"x": torch.tensor(float(i))}, logging_steps=2, learning_rate=0.0)
    trainer.fit()
    rows = trainer.run.read_metrics()
    assert [(r["step"], r["loss"], r["contrast"]) for r in rows] == [(2, 0.5, 1.0), (4, 2.5, 5.0)]


def test_bf16_autocast_is_taken_off_after_training(tmp_path):
    seen = []

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Linear(4, 4)

        def forward(self, batch):
            out = self.w(batch["x"])
            seen.append(out.dtype)
            return {"loss": out.float().square().mean()}

    model = Mixed()
    make(tmp_path, model, lambda i, r, w: {"x": torch.ones(1, 4)}, bf16=True, max_steps=1).fit()
    assert seen == [torch.bfloat16] and model.w.weight.dtype == torch.float32
    model({"x": torch.ones(1, 4)})
    assert seen[-1] == torch.float32


def test_batches_ahead_equal_batches_on_demand_and_errors_come_through():
    def batch_fn(step, rank, world):
        if step == 7:
            raise UserError("cannot read", "a.png")
        return (step, rank, world)

    for prefetch in (0, 1, 3):
        batches = StepBatches(batch_fn, 9, rank=1, world=2, prefetch=prefetch)
        assert [batches[i] for i in (0, 1, 2, 5, 6)] == [(i, 1, 2) for i in (0, 1, 2, 5, 6)]  # a jump is a resume
        with pytest.raises(UserError, match="a.png"):
            batches[7]
        batches.close()


def test_groups_must_match_what_trains(tmp_path):
    model = Noisy(False)
    groups = set_trainable(model, [ParamGroup("head", list(model.head.parameters()))])
    model.tower.requires_grad_(True)
    section = TrainSection(max_steps=1, threads=1)
    run = RunFolder.open(tmp_path / "run", "toy", section)
    with pytest.raises(ValueError, match="tower.weight"):
        MMTrainer(model, lambda i, r, w: {}, groups, section, run).fit()


def test_a_disk_that_fills_up_harms_no_checkpoint(tmp_path):
    """The optimizer's state no longer fits at step 4: torch.save says so as a RuntimeError about its zip file."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.inner = nn.Linear(200, 200)

        def forward(self, batch):
            return {"loss": self.inner(batch["x"]).square().mean()}

    class Fill(StepHook):
        def before_forward(self, model, batch, step):
            if step == 3:
                resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))  # weights 161 kB, moments 322 kB

    def batch(step, rank, world):
        return {"x": torch.full((2, 200), step / 10)}

    whole = make(tmp_path, Wide(), batch, name="whole", save_steps=2)
    whole.fit()
    filling = make(tmp_path, Wide(), batch, name="cut", save_steps=2, hooks=[Fill()])
    try:
        with pytest.raises(UserError, match="cannot write a checkpoint .*make room, then go on with --resume"):
            filling.fit()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in filling.run.checkpoints().iterdir()] == ["checkpoint-2"]
    again = make(tmp_path, Wide(), batch, name="cut", save_steps=2)
    assert again.fit()["resumed_from"] == 2
    assert_bit_equal(whole.model.state_dict(), again.model.state_dict())


def test_the_best_checkpoint_is_kept_and_measuring_changes_nothing(tmp_path):
    losses = iter([0.5, 0.2, 0.9, 0.8])
    modes = []

    def measured():
        modes.append(model.training)
        return next(losses)

    def batch(step, rank, world):
        return {"x": torch.ones(4, 8) * step, "y": torch.ones(4, 1)}

    torch.manual_seed(0)
    model, plain = Noisy(True), Noisy(True)
    plain.load_state_dict(model.state_dict())
    section = TrainSection(max_steps=4, threads=1, save_steps=1, save_total_limit=1, logging_steps=1)
    folders = [RunFolder.open(tmp_path / n, "toy", section) for n in ("measured", "plain")]
    groups = [set_trainable(m, [("head", m.head.parameters(), None)]) for m in (model, plain)]
    trainer = MMTrainer(model, batch, groups[0], section, folders[0], held_out=measured)
    trainer.fit()
    MMTrainer(plain, batch, groups[1], section, folders[1]).fit()
    assert modes == [False] * 4
    assert_bit_equal(model.state_dict(), plain.state_dict())
    assert [p.name for p in folders[0].all_checkpoints()] == ["checkpoint-2", "checkpoint-4"]
    assert [p.name for p in folders[1].all_checkpoints()] == ["checkpoint-4"]
    rows = [(r["step"], r["held_out_loss"]) for r in folders[0].read_metrics() if "held_out_loss" in r]
    assert rows == [(1, 0.5), (2, 0.2), (3, 0.9), (4, 0.8)]
    assert trainer.load_best() == 2
    best = load_file(folders[0].path / "checkpoints" / "checkpoint-2" / "model.safetensors")
    assert torch.equal(model.head.weight, best["head.weight"]) and not torch.equal(
        plain.head.weight, best["head.weight"]
    )
