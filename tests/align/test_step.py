"""A training step: chunks change nothing but memory, missing modalities take no part, weights follow their schedule."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from mmllm.align.config import WeightConfig
from mmllm.align.objectives import InfoNCE, SigLIP
from mmllm.align.step import AlignStep
from mmllm.blocks.ema import Teacher
from mmllm.blocks.queue import FeatureQueue
from mmllm.config import parse_config
from mmllm.contracts import AlignBatch, Objective, Stream
from mmllm.errors import UserError
from mmllm.registry import register
from mmllm.train.align import AlignConfig, AlignStage
from mmllm.train.align_objectives import phase_parts
from mmllm.train.align_trains import groups


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("MMLLM_CACHE", str(tmp_path_factory.mktemp("cache")))


def loss_and_gradients(settings, chunk):
    """Of the first step of the tiny world's phase ``both``, in float32."""
    stage = AlignStage(parse_config(copy.deepcopy(settings), AlignConfig))
    phase = stage.config.phases["both"]
    parts = phase_parts(stage.config, phase, stage.model)
    step = AlignStep(stage.model, parts.objectives, parts.terms, parts.want, chunk=chunk)
    groups(stage.config, stage.model, phase, step)
    sources = stage._sources(0, phase, parts, step)
    batch = {"sources": {k: s.batch(0) for k, s in sources.items()}, "step": 0}
    step.train()
    torch.manual_seed(5)
    out = step(batch)
    out["loss"].backward()
    return out, {n: p.grad for n, p in step.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("chunk", [3, "auto"])
def test_a_step_in_chunks_has_the_gradients_of_the_whole(settings, chunk):
    settings["streams"]["audio"]["tower"] = {
        "model": "tiny:audio_transformer",
        "hidden_size": 32,
        "layers": 1,
        "heads": 2,
    }
    whole, expected = loss_and_gradients(settings, None)
    parts, got = loss_and_gradients(settings, chunk)
    torch.testing.assert_close(parts["loss"], whole["loss"])
    assert got.keys() == expected.keys() and "model.logit_scale.image:text" in got
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-3, atol=1e-5, msg=name)
    each, valid = whole["each"]["infonce:image:text"]
    assert each.shape == valid.shape == (8,) and valid.all()
    torch.testing.assert_close(each.mean().detach(), whole["infonce:image:text"])


def test_an_objective_that_cannot_be_chunked_is_refused(settings):
    @register("objective", "whole_only")
    class WholeOnly(Objective):
        two_pass = False
        needs = frozenset({"image.embedding"})

    settings["phases"]["both"] |= {"chunk_size": 4, "objectives": [{"type": "whole_only", "sources": ["things"]}]}
    stage = AlignStage(parse_config(settings, AlignConfig))
    with pytest.raises(UserError, match="'whole_only' does not work in chunks"):
        phase_parts(stage.config, stage.config.phases["both"], stage.model)


def units(n, seed):
    return F.normalize(torch.randn(n, 6, generator=torch.Generator().manual_seed(seed)), dim=-1)


def pair_batch(a, b, labels, owner_a=None, owner_b=None):
    streams = {"image": Stream(embedding=a, owner=owner_a), "text": Stream(embedding=b, owner=owner_b)}
    scale = torch.tensor(5.0, requires_grad=True)
    return AlignBatch(
        streams, ids=[str(i) for i in range(len(labels))], labels=labels,
        logit_scale={"image:text": scale}, logit_bias={"image:text": torch.tensor(-2.0)},
    )  # fmt: skip


@pytest.mark.parametrize("kind", [InfoNCE, SigLIP])
def test_items_without_one_of_the_pair_take_no_part(kind):
    a, b = units(4, 0).requires_grad_(), units(5, 1).requires_grad_()
    owner_a, owner_b = torch.tensor([0, 2, 3, 5]), torch.tensor([0, 1, 3, 4, 5])
    out = kind(["image", "text"])(pair_batch(a, b, list("uvwxyz"), owner_a, owner_b))
    assert out["valid"].tolist() == [True, False, False, True, False, True]
    loss = out["loss"][out["valid"]].mean()
    loss.backward()
    x, y = (t.detach()[k].requires_grad_() for t, k in ((a, [0, 2, 3]), (b, [0, 2, 4])))
    expected = kind(["image", "text"])(pair_batch(x, y, list("uxz")))["loss"].mean()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(a.grad[[0, 2, 3]], x.grad)
    assert not a.grad[1].any() and not b.grad[[1, 3]].any()


def test_several_captions_of_an_item_are_its_positives():
    a, b, owner = units(2, 0), units(5, 1), torch.tensor([0, 0, 1, 1, 1])
    out = InfoNCE(["image", "text"])(pair_batch(a, b, ["u", "v"], None, owner))
    logits = 5.0 * a @ b.T
    forth = torch.stack([-logits.log_softmax(1)[i][owner == i].mean() for i in range(2)])
    back = F.cross_entropy(logits.T, owner, reduction="none")
    back = torch.stack([back[owner == i].mean() for i in range(2)])
    torch.testing.assert_close(out["loss"], (forth + back) / 2)


def test_a_batch_in_which_nobody_has_the_pair_counts_nothing():
    batch = pair_batch(units(1, 0), units(1, 1), ["u", "v"], torch.tensor([0]), torch.tensor([1]))
    out = InfoNCE(["image", "text"])(batch)
    out["loss"].sum().backward()
    assert not out["valid"].any() and not out["loss"].any()


def test_weights_follow_their_schedule():
    ramp = WeightConfig(start=1.0, end=3.0, begin=0.25, until=0.75)
    assert [ramp.at(s, 100) for s in (0, 25, 50, 75, 99)] == [1.0, 1.0, 2.0, 3.0, 3.0]
    steps = WeightConfig(start=0.0, end=1.0, begin=10, until=20, shape="cosine")
    assert steps.at(15, 1000) == pytest.approx(0.5) and steps.at(12, 1000) < 0.2 and steps.at(20, 1000) == 1.0
    jump = WeightConfig(start=0.0, end=1.0, until=5, shape="step")
    assert [jump.at(s, 100) for s in (4, 5)] == [0.0, 1.0]


def test_a_teacher_follows_in_closed_form():
    net = torch.nn.Linear(2, 1, bias=False)
    teacher = Teacher({"head": net}, momentum=0.9)
    start = net.weight.detach().clone()
    with torch.no_grad():
        net.weight += 1.0
    for _ in range(3):
        teacher.follow()
    torch.testing.assert_close(teacher.copies["head"].weight, start + 1 - 0.9**3)
    assert {n.split(".")[0] for n, _ in teacher.named_parameters()} == {"copies"}
    assert not any(p.requires_grad for p in teacher.parameters()) and not teacher.train().training
    ramp = Teacher({"head": net}, momentum=0.9, end=1.0)
    assert [ramp.momentum_at(p) for p in (0.0, 0.5, 1.0)] == pytest.approx([0.9, 0.95, 1.0])


def test_a_queue_overwrites_its_oldest_rows():
    queue = FeatureQueue(3, 1, names=True)
    queue.push(torch.tensor([[1.0], [2.0]]), torch.tensor([1, 2]))
    assert len(queue) == 2 and queue.content().flatten().tolist() == [1.0, 2.0]
    queue.push(torch.tensor([[3.0], [4.0]]), torch.tensor([3, 4]))
    assert sorted(queue.content().flatten().tolist()) == [2.0, 3.0, 4.0]
    again = FeatureQueue(3, 1, names=True)
    again.load_state_dict(queue.state_dict())
    assert torch.equal(again.content_numbers(), queue.content_numbers()) and len(again) == 3
