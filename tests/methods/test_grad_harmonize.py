"""Gradient harmonization's oracles: the catalogue's entry 3."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mmllm.align.objectives import InfoNCE
from mmllm.align.step import Term
from mmllm.config import parse_config
from mmllm.contracts import AlignBatch, Stream
from mmllm.errors import UserError
from mmllm.methods.grad_harmonize import GradHarmonize, auc, correction, item_cosine
from mmllm.train.align import align
from mmllm.train.align_config import AlignConfig
from tests.align.conftest import settings, world  # noqa: F401

NAMES = ["infonce:image:audio", "infonce:image:text"]


class Model:
    """What the hook asks of an AlignStep."""

    total_steps = 10
    terms = [Term(n, 1.0, ("s",)) for n in NAMES]


def made(unit, agree=False, progress=0.0, owner=None, meta=None):
    """Raw rows of three streams, and the losses of a step on their unit vectors."""
    raw = {s: unit(6, 4, seed=k).requires_grad_() for k, s in enumerate(("image", "audio", "text"))}
    if agree:
        raw["text"] = raw["audio"].detach().clone().requires_grad_()
    streams = {s: Stream(embedding=F.normalize(x, dim=-1)) for s, x in raw.items()}
    if owner is not None:
        streams["audio"] = Stream(embedding=F.normalize(raw["audio"], dim=-1)[owner], owner=owner)
    scales = {f"image:{s}": torch.tensor(5.0) for s in ("audio", "text")}
    batch = AlignBatch(streams, list("abcdef"), logit_scale=scales, progress=progress, extras={"meta": meta})
    each = {}
    for name in NAMES:
        found = InfoNCE(name.split(":")[1:])(batch)
        each[name] = found["loss"], found.get("valid", torch.ones(6, dtype=torch.bool))
    total = torch.stack([loss[v].mean() for loss, v in each.values()]).sum()
    return raw, {"loss": total, "each": each, "batches": {"s": batch}}


def gradients(raw, loss):
    return dict(zip(raw, torch.autograd.grad(loss, list(raw.values()), retain_graph=True)))


def run(losses, **options):
    hook = GradHarmonize("image", **options)
    hook.after_loss(Model(), None, losses, 0)
    return losses


def test_conflicting_gradients_become_orthogonal(unit):
    g1, g2 = unit(40, 3) * 2, unit(40, 3, seed=1)
    dot = (g1 * g2).sum(-1)
    new = g1 + g2 + correction(g1, g2)
    one = g1 - (dot / g2.square().sum(-1))[:, None] * g2
    two = g2 - (dot / g1.square().sum(-1))[:, None] * g1
    clash = dot < 0
    assert 5 < clash.sum() < 35
    torch.testing.assert_close(new[clash], (one + two)[clash])
    torch.testing.assert_close((one * g2).sum(-1)[clash], torch.zeros(int(clash.sum())), atol=1e-6, rtol=0)
    cosine = dot / (g1.norm(dim=-1) * g2.norm(dim=-1))
    torch.testing.assert_close((one * two).sum(-1)[clash], (-dot * (1 - cosine**2))[clash])
    assert (correction(g1, g2)[~clash] == 0).all()


def test_opposite_gradients_cancel(unit):
    g = unit(5, 4)
    torch.testing.assert_close(g - 2 * g + correction(g, -2 * g), torch.zeros(5, 4))


@pytest.mark.parametrize("level", ["embedding", "batch"])
def test_without_conflict_nothing_changes(unit, level):
    raw, losses = made(unit, agree=True)
    plain, before = gradients(raw, losses["loss"]), losses["loss"]
    hook = GradHarmonize("image", gamma=None, level=level)
    hook.groups = {"image.head": [raw["image"]]}
    hook.after_loss(Model(), None, losses, 0)
    assert losses["loss"] is before and losses["conflict"] == 0
    assert all(torch.equal(plain[s], g) for s, g in gradients(raw, losses["loss"]).items())


def test_the_anchor_gets_the_projected_gradient_and_the_others_their_own(unit):
    raw, losses = made(unit)
    z = losses["batches"]["s"].streams["image"].embedding
    parts = [torch.autograd.grad(losses["each"][n][0].mean(), z, retain_graph=True)[0] for n in NAMES]
    g1, g2 = (g - (g * z).sum(-1, keepdim=True) * z for g in parts)
    expected = []
    for a, b in zip(g1, g2):
        dot = a @ b
        expected.append(a + b if dot >= 0 else a - dot / (b @ b) * b + b - dot / (a @ a) * a)
    assert any(a @ b < 0 for a, b in zip(g1, g2))
    plain, value = gradients(raw, losses["loss"]), losses["loss"].detach()
    run(losses, gamma=None)
    got = gradients(raw, losses["loss"])
    torch.testing.assert_close(losses["loss"].detach(), value)
    for other in ("audio", "text"):
        torch.testing.assert_close(got[other], plain[other])
    (seen,) = torch.autograd.grad(losses["loss"], z, retain_graph=True)
    seen = seen - (seen * z).sum(-1, keepdim=True) * z
    torch.testing.assert_close(seen, torch.stack(expected).detach())
    assert not torch.allclose(got["image"], plain["image"])


def test_level_batch_projects_the_gradients_of_the_parameters(unit):
    weight = torch.nn.Parameter(torch.eye(4) + 0.3 * unit(4, 4, seed=9))
    x, target = unit(6, 4), unit(6, 4, seed=1)
    z = F.normalize(x @ weight, dim=-1)
    streams = {"image": Stream(embedding=z), "audio": Stream(embedding=target), "text": Stream(embedding=-target)}
    scales = {f"image:{s}": torch.tensor(5.0) for s in ("audio", "text")}
    batch = AlignBatch(streams, list("abcdef"), logit_scale=scales)
    each = {n: (InfoNCE(n.split(":")[1:])(batch)["loss"], torch.ones(6, dtype=torch.bool)) for n in NAMES}
    losses = {"loss": sum(v.mean() for v, _ in each.values()), "each": each, "batches": {"s": batch}}
    a, b = (torch.autograd.grad(v.mean(), weight, retain_graph=True)[0].flatten() for v, _ in each.values())
    assert a @ b < 0
    hook = GradHarmonize("image", gamma=None, level="batch")
    hook.groups = {"image.head": [weight], "text.head": []}
    hook.after_loss(Model(), None, losses, 0)
    expected = a - (a @ b) / (b @ b) * b + b - (a @ b) / (a @ a) * a
    torch.testing.assert_close(torch.autograd.grad(losses["loss"], weight)[0].flatten(), expected)


def test_curriculum(unit):
    raw, losses = made(unit)
    plain = gradients(raw, losses["loss"])
    value = losses["loss"].detach()
    assert run(losses, gamma=[-1, -1], realign=False)["kept"] == 1
    torch.testing.assert_close(losses["loss"].detach(), value)
    torch.testing.assert_close(gradients(raw, losses["loss"])["image"], plain["image"])
    # Half-way from -1 to 1 the bound is 0: the items in conflict go, and the loss is the mean of the others'.
    _, losses = made(unit, progress=0.5)
    z = losses["batches"]["s"].streams["image"].embedding
    parts = [torch.autograd.grad(losses["each"][n][0].mean(), z, retain_graph=True)[0] for n in NAMES]
    g1, g2 = (g - (g * z).sum(-1, keepdim=True) * z for g in parts)
    kept = (g1 * g2).sum(-1) >= 0
    expected = torch.stack([losses["each"][n][0][kept].mean() for n in NAMES]).sum()
    run(losses, gamma=[-1, 1], realign=False)
    assert 0 < kept.sum() < 6 and losses["kept"] == kept.float().mean()
    torch.testing.assert_close(losses["loss"].detach(), expected.detach())


def test_items_without_a_stream_are_kept(unit):
    _, losses = made(unit, owner=torch.tensor([0, 1, 3]))
    run(losses, gamma=[1.0, 1.0], realign=True)
    assert losses["kept"] >= 0.5 and torch.isfinite(losses["loss"])


def test_cosine_and_auc():
    g1, g2 = torch.tensor([[1.0, 0], [0, 1.0], [1, 1]]), torch.tensor([[1.0, 0], [0, -1.0], [0, 0]])
    expected = torch.tensor([1.0, -1.0, 0.0, 0.0])
    torch.testing.assert_close(item_cosine(g1, g2, torch.arange(3), 4), expected)
    assert item_cosine(g1, g2, torch.tensor([0, 0, 1]), 2)[0] == 0
    score, wrong = torch.tensor([0.9, 0.2, 0.5, 0.5]), torch.tensor([True, False, True, False])
    assert auc(score, wrong) == pytest.approx((1 + 1 + 1 + 0.5) / 4) and auc(score, ~wrong) == pytest.approx(0.125)


def test_mistakes_are_named(unit):
    _, losses = made(unit)
    with pytest.raises(UserError, match="level"):
        GradHarmonize("image", level="param")
    with pytest.raises(UserError, match="did you mean 'infonce:image:text'"):
        run(losses, terms=["infonce:image:tex", NAMES[0]])
    losses["each"].pop(NAMES[0])
    with pytest.raises(UserError, match="1 losses per item"):
        run(losses)


def test_a_run_with_the_hook(settings, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("MMLLM_CACHE", str(tmp_path / "cache"))
    both = settings["phases"]["both"]
    both["sources"] = {
        "things": {
            "data": ["things_train.jsonl", "sounds_train.jsonl"],
            "recipes": [{"type": "join_by_label"}, {"type": "mismatch", "field": "audio", "share": 0.5}],
            "streams": ["image", "audio", "text"],
        }
    }
    both["objectives"] = [{"type": "infonce", "options": {"pair": n.split(":")[1:]}} for n in NAMES]
    both |= {"trains": ["image.head", "audio.head", "text.head"], "train": {"max_steps": 4, "logging_steps": 1}}
    settings["phases"], settings["measures"] = {"both": both}, {}
    weights = []
    for number, hooks in enumerate([[], [{"type": "grad_harmonize", "anchor": "image", "mark": "mismatch"}]]):
        both["hooks"] = hooks
        out = align(parse_config(settings, AlignConfig), tmp_path / str(number))
        text = (out / "metrics.jsonl").read_text()
        assert ("conflict_auc" in text) == ("kept" in text) == bool(hooks)
        from mmllm.align.folder import load_align

        weights.append(next(load_align(out).heads["image"].parameters()).detach())
    assert not torch.allclose(*weights)
