"""A teacher's weights in closed form, its momentum along the training, and what it leaves alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmllm.blocks.ema import Teacher


def source():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))


def test_weights_after_k_steps_have_their_closed_form():
    module = source()
    start = {k: p.detach().clone() for k, p in module.named_parameters()}
    teacher = Teacher({"head": module}, momentum=0.9)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(1.0)
    for _ in range(5):
        teacher.follow()
    for name, p in teacher.copies["head"].named_parameters():
        torch.testing.assert_close(p, start[name] + 1 - 0.9**5)


def test_momentum_goes_along_a_cosine():
    teacher = Teacher({"x": nn.Linear(1, 1)}, momentum=0.9, end=1.0)
    assert [teacher.momentum_at(p) for p in (0.0, 0.5, 1.0, 1.5)] == pytest.approx([0.9, 0.95, 1.0, 1.0])
    assert Teacher({"x": nn.Linear(1, 1)}, momentum=0.9).momentum_at(0.7) == 0.9


def test_follow_uses_the_momentum_of_its_progress():
    module = nn.Linear(2, 2)
    teacher = Teacher({"x": module}, momentum=0.0, end=1.0)
    before = teacher.copies["x"].weight.clone()
    nn.init.ones_(module.weight)
    teacher.follow(1.0)
    assert torch.equal(teacher.copies["x"].weight, before)
    teacher.follow(0.5)
    torch.testing.assert_close(teacher.copies["x"].weight, (before + 1) / 2)
    teacher.follow(0.0)
    assert torch.equal(teacher.copies["x"].weight, torch.ones(2, 2))


def test_buffers_are_taken_over_as_they_are():
    module = source().train()
    teacher = Teacher({"head": module}, momentum=0.99)
    module(torch.randn(16, 3) + 5)
    teacher.follow()
    norm = teacher.copies["head"][1]
    assert torch.equal(norm.running_mean, module[1].running_mean) and int(norm.num_batches_tracked) == 1


def test_a_teacher_is_always_in_eval_mode():
    teacher = Teacher({"head": source().train()})
    assert not any(m.training for m in teacher.modules())
    around = nn.ModuleDict({"teacher": teacher}).train()
    assert around.training and not any(m.training for m in teacher.modules())


def test_only_its_copies_are_its_own_and_none_of_them_trains():
    module = source()
    teacher = Teacher({"head": module})
    theirs = {id(p) for p in module.parameters()}
    assert not theirs & {id(p) for p in teacher.parameters()}
    assert len(list(teacher.parameters())) == len(theirs)
    assert not any(p.requires_grad for p in teacher.parameters()) and all(p.requires_grad for p in module.parameters())
    assert teacher.state_dict().keys() == {f"copies.head.{k}" for k in module.state_dict()}
