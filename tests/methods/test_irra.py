"""IRRA's oracles: the catalogue's entry 31."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from mmllm.config import parse_config
from mmllm.contracts import Features, Stream
from mmllm.errors import UserError
from mmllm.methods.irra import SDM, Identity, ImplicitRelations
from mmllm.train.align import AlignConfig, align
from tests.align.conftest import settings, world  # noqa: F401

PAIR = ["image", "text"]


def written_out(scores, label, eps=1e-8):
    """Sum over both directions of the mean KL(p || q + eps)."""
    same = (label[:, None] == label[None]).double()
    total = 0.0
    for s, q in ((scores, same / same.sum(1, keepdim=True)), (scores.T, same.T / same.T.sum(1, keepdim=True))):
        p = s.double().softmax(1)
        total = total + (p * (s.double().log_softmax(1) - (q + eps).log())).sum(1).mean()
    return total


def test_equal_similarities(make_batch):
    same = F.normalize(torch.ones(4, 8), dim=-1)
    apart = make_batch({"image": same, "text": same}, labels=list("abcd"))
    expected = 2 * (-math.log(4) - 0.75 * math.log(1e-8))
    assert float(SDM(PAIR)(apart)["loss"].mean()) == pytest.approx(expected, abs=1e-3)
    assert expected == pytest.approx(24.8584, abs=1e-4)
    alike = make_batch({"image": same, "text": same}, labels=list("aaaa"))
    assert float(SDM(PAIR)(alike)["loss"].mean()) == pytest.approx(0, abs=1e-5)


def test_written_out_and_its_minimum(make_batch, unit):
    a, b, label = unit(6, 8), unit(6, 8, seed=1), torch.tensor([0, 1, 0, 2, 2, 2])
    batch = make_batch({"image": a, "text": b}, labels=[str(int(x)) for x in label])
    loss = SDM(PAIR)(batch)["loss"].mean()
    assert float(loss) == pytest.approx(float(written_out(a @ b.T / 0.02, label)), rel=1e-5)
    right = F.one_hot(label, 8).float()
    best = SDM(PAIR)(make_batch({"image": right, "text": right}, labels=batch.labels))["loss"].mean()
    assert -2 * math.log(1 + 6e-8) - 1e-5 <= float(best) < 1e-5 < float(loss)


def test_gradient_of_the_similarities(make_batch):
    scores = torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.double).requires_grad_()
    q = torch.eye(4, dtype=torch.double) + 1e-8
    p = scores.softmax(1)
    (p * (p.log() - q.log())).sum().backward()
    a = (p.log() - q.log()).detach()
    p = p.detach()
    torch.testing.assert_close(scores.grad, p * (a - (p * a).sum(1, keepdim=True)))
    # The same through the objective: rows are one-hot, so that the texts are the columns of the scores.
    table = (0.1 * scores.detach()).float().requires_grad_()
    batch = make_batch({"image": torch.eye(4), "text": table.T}, labels=list("abcd"))
    SDM(PAIR, temperature=0.1)(batch)["loss"].mean().backward()
    other = scores.detach().clone().requires_grad_()
    pt = other.T.softmax(1)
    (pt * (pt.log() - q.log())).sum().backward()
    expected = (scores.grad + other.grad) / 4 / 0.1
    torch.testing.assert_close(table.grad.double(), expected, atol=1e-4, rtol=1e-4)


def test_partial_targets_and_missing_texts(make_batch, unit):
    a, b = unit(4, 8), unit(4, 8, seed=1)
    batch = make_batch({"image": a, "text": b}, labels=list("aabb"))
    q = torch.tensor([[1, 0.3, 0, 0], [0.3, 1, 0, 0], [0, 0, 1, 0.3], [0, 0, 0.3, 1]]) / 1.3
    expected = 0.0
    for s in (a @ b.T / 0.02, b @ a.T / 0.02):
        p = s.softmax(1)
        expected = expected + (p * (s.log_softmax(1) - (q + 1e-8).log())).sum(1)
    torch.testing.assert_close(SDM(PAIR, partial=0.3)(batch)["loss"], expected, rtol=1e-4, atol=1e-4)
    batch.streams["text"].owner = torch.arange(4)
    torch.testing.assert_close(SDM(PAIR, partial=0.3)(batch)["loss"], expected, rtol=1e-4, atol=1e-4)
    batch.streams["text"] = Stream(embedding=b[:2], owner=torch.tensor([0, 3]))
    batch.items = torch.arange(4)
    assert SDM(PAIR)(batch)["valid"].tolist() == [True, False, False, True]


class Tower:
    modality, vocab_size = "text", 11

    def __init__(self, width):
        self.hidden_size = width

    def preprocessor(self):
        return range(11)


class Model:
    embedding_dim = 8

    def tower(self, name):
        return Tower(12 if name.startswith("text") else 6)


def words_and_picture(**about):
    g = torch.Generator().manual_seed(0)
    labels = torch.full((2, 5), -100)
    labels[0, 1], labels[1, 3] = 4, 7
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    text = Features(torch.randn(2, 5, 12, generator=g), mask, torch.zeros(2, 12))
    image = Features(torch.randn(2, 3, 6, generator=g), torch.ones(2, 3).bool(), torch.zeros(2, 6))
    return {"image": Stream(image), "text@irr": Stream(text, extras={"labels": labels})}


def test_masked_words_look_at_their_own_picture(make_batch):
    torch.manual_seed(0)
    objective = ImplicitRelations(PAIR, layers=2, heads=4)
    objective.setup(Model())
    batch = make_batch({}, ids=["a", "b"])
    batch.streams = words_and_picture()
    text, image = batch.streams["text@irr"].features, batch.streams["image"].features
    fused = objective.fuse(text.tokens, text.mask, image.tokens, image.mask)
    logits = objective.head(torch.stack([fused[0, 1], fused[1, 3]]))
    expected = F.cross_entropy(logits, torch.tensor([4, 7]))
    torch.testing.assert_close(objective(batch)["loss"], expected)
    text.tokens[0, 3:] = 100.0  # padding is not read
    torch.testing.assert_close(objective(batch)["loss"], expected)
    changed = image.tokens.clone()
    changed[1] += torch.randn(3, 6)
    after = objective.fuse(text.tokens, text.mask, changed, image.mask)
    torch.testing.assert_close(after[0, :3], fused[0, :3])
    assert not torch.allclose(after[1], fused[1])
    # An item without a picture is left out, and none of them is no mistake.
    one = Features(image.tokens[:1], image.mask[:1], image.pooled[:1])
    batch.streams["image"] = Stream(one, owner=torch.tensor([1]))
    alone = objective.fuse(text.tokens[1:], text.mask[1:], one.tokens, one.mask)[0, 3]
    expected = F.cross_entropy(objective.head(alone[None]), torch.tensor([7]))
    torch.testing.assert_close(objective(batch)["loss"], expected)
    batch.streams["text@irr"].extras["labels"] = torch.full((2, 5), -100)
    assert float(objective(batch)["loss"].detach()) == 0


def test_identities(make_batch, unit):
    torch.manual_seed(0)
    objective = Identity(PAIR, identities=3, scale=2.0)
    objective.setup(Model())
    torch.nn.init.normal_(objective.classifier.weight)
    a, b = unit(3, 8), unit(3, 8, seed=1)
    batch = make_batch({"image": a, "text": b}, labels=["x", "y", "x"])
    out = objective(batch)
    number = objective.numbers(torch.tensor([int(k) for k in objective.known[:2]]))
    assert number.tolist() == [0, 1]
    from mmllm.align.record_keys import stable_id

    target = objective.numbers(torch.tensor([stable_id(x) for x in "xyx"]))
    assert target[0] == target[2] != target[1]
    expected = 0.5 * sum(F.cross_entropy(objective.classifier(2 * x), target, reduction="none") for x in (a, b))
    torch.testing.assert_close(out["loss"], expected)
    with pytest.raises(UserError, match="more than identities = 3"):
        objective(make_batch({"image": a, "text": b}, labels=["u", "v", "w"]))
    with pytest.raises(UserError, match="temperature and floor"):
        SDM(PAIR, temperature=0)


def test_a_run_with_all_three_and_the_same_model_without(settings, tmp_path):  # noqa: F811
    both = settings["phases"]["both"]
    both["sources"] = {"things": both["sources"]["things"]}
    both |= {"trains": ["image.head", "text.head"], "train": {"max_steps": 12, "logging_steps": 4, "max_grad_norm": 0}}
    sdm = {"type": "sdm", "options": {"pair": PAIR}}
    irr = {"type": "irr", "options": {"pair": PAIR, "layers": 1, "p": 0.5}}
    identity = {"type": "identity", "options": {"pair": PAIR, "identities": 8}}
    settings |= {"phases": {"both": both}, "measures": {}}
    heads = {}
    for name, objectives in (("all", [sdm, irr, identity]), ("words", [sdm, irr]), ("sdm", [sdm])):
        both["objectives"] = objectives
        out = align(parse_config(copy.deepcopy(settings), AlignConfig), tmp_path / name)
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        losses = [r for r in rows if "loss" in r]
        assert losses[-1]["sdm:image:text"] < losses[0]["sdm:image:text"]
        heads[name] = load_file(out / "final" / "heads.safetensors")
    assert set(heads["all"]) == set(heads["sdm"])  # the model has no part of the block
    # With frozen towers the block alone learns from masked words, so that the same embeddings come out.
    assert all(torch.equal(heads["words"][k], v) for k, v in heads["sdm"].items())
    assert not all(torch.equal(heads["all"][k], v) for k, v in heads["sdm"].items())
