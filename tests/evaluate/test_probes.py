"""Nearest neighbours and probes against plain numpy, optimality conditions, and data where the answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mmllm.contracts import Scorer
from mmllm.errors import UserError
from mmllm.evaluate.probes import LinearProbe, knn_classify, probe_figures
from mmllm.evaluate.search import nearest


def blobs(n=90, classes=3, spread=0.4, seed=0):
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    centres = torch.randn(classes, 5, generator=torch.Generator().manual_seed(77))
    return centres[labels] + spread * torch.randn(n, 5, generator=g), labels


@pytest.mark.parametrize(("chunk", "query_chunk"), [(1000, 1000), (7, 3), (1, 1)])
def test_nearest_agrees_with_a_full_sort(chunk, query_chunk):
    g = torch.Generator().manual_seed(0)
    q, x = torch.randn(10, 4, generator=g), torch.randn(25, 4, generator=g)
    x[10:20] = x[:10]  # ties: the earlier item comes first
    a, b = (v.double().numpy() / np.linalg.norm(v.double().numpy(), axis=1, keepdims=True) for v in (q, x))
    order = np.lexsort((np.broadcast_to(np.arange(25), (10, 25)), -(a @ b.T).round(9)), axis=1)

    class Rounded(Scorer):
        def score(self, query, gallery):
            return super().score(query, gallery).mul(1e4).round()

    scores, index = nearest(q, x, 6, Rounded(), chunk, query_chunk)
    assert index.tolist() == order[:, :6].tolist()
    assert (scores.diff(dim=1) <= 0).all() and scores.shape == (10, 6)


def test_nearest_puts_nan_last_and_takes_any_scorer():
    x = torch.tensor([[torch.nan, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert nearest(torch.tensor([[0.0, 1.0]]), x, 3)[1].tolist() == [[2, 1, 0]]

    class Far(Scorer):
        def score(self, query, gallery):
            return torch.cdist(query, gallery)

    assert nearest(torch.zeros(1, 2), torch.tensor([[1.0, 0], [9, 0], [3, 0]]), 2, Far())[1].tolist() == [[1, 2]]


@pytest.mark.parametrize("temperature", [None, 0.07])
def test_knn_against_loops(temperature):
    x, labels = blobs(spread=1.0)
    test, _ = blobs(40, spread=1.0, seed=1)
    a, b = (v.double().numpy() / np.linalg.norm(v.double().numpy(), axis=1, keepdims=True) for v in (test, x))
    expected = []
    for row in a @ b.T:
        held = np.argsort(-row)[:5]
        votes = np.zeros(3)
        for h in held:
            votes[labels[h]] += 1 if temperature is None else np.exp(row[h] / temperature)
        expected.append(int(votes.argmax()))
    assert knn_classify(x, labels, test, 5, temperature).tolist() == expected
    assert knn_classify(x, labels, test, 1000).shape == (40,)


def test_a_linear_probe_is_at_the_optimum():
    x, labels = blobs(spread=1.5)
    probe = LinearProbe.fit(x, labels, penalty=0.1)
    logits = x.double().numpy() @ probe.weight.numpy().T + probe.bias.numpy()
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    residual = (p - np.eye(3)[labels.numpy()]) / len(x)
    # The gradient of the penalised cross-entropy, which is strictly convex in the weights, vanishes.
    assert np.abs(residual.T @ x.double().numpy() + 0.1 * probe.weight.numpy()).max() < 1e-6
    assert np.abs(residual.sum(0)).max() < 1e-6


def test_a_strong_penalty_leaves_the_class_frequencies():
    x, _ = blobs()
    labels = torch.tensor([0] * 60 + [1] * 20 + [2] * 10)
    probe = LinearProbe.fit(x, labels, penalty=1e6)
    share = torch.softmax(probe.bias, 0)
    torch.testing.assert_close(share, torch.tensor([60, 20, 10]).double() / 90, atol=1e-4, rtol=0)
    assert probe.weight.abs().max() < 1e-4


def test_search_prefers_what_holds_up_on_other_rows():
    x, labels = blobs(60, spread=0.3)
    noise = torch.randn(60, 200, generator=torch.Generator().manual_seed(3)) * 3
    probe, penalty = LinearProbe.search(torch.cat([x, noise], 1), labels)
    test, truth = blobs(60, spread=0.3, seed=9)
    unseen = torch.cat([test, torch.randn(60, 200, generator=torch.Generator().manual_seed(4)) * 3], 1)
    hits = (probe.predict(unseen) == truth).float().mean()
    worst = (LinearProbe.fit(torch.cat([x, noise], 1), labels, 1e-6).predict(unseen) == truth).float().mean()
    assert hits >= worst and penalty in (1e-6, 1e-4, 1e-2, 1.0)


def test_figures():
    train, test = blobs(spread=0.2), blobs(60, spread=0.2, seed=1)
    names = lambda labels: ["abc"[i] for i in labels]  # noqa: E731
    figures = {f.name: f for f in probe_figures("p", (train[0], names(train[1])), (test[0], [*names(test[1])]))}
    assert set(figures) == {"p_knn", "p_linear"}
    for f in figures.values():
        assert f.value > 0.95 and f.chance == pytest.approx(1 / 3) and f.control < 0.7 and f.n == 60
    strange = probe_figures("p", (train[0], names(train[1])), (test[0], ["zebra", *names(test[1][1:])]))
    assert strange[0].n == 59
    for labels in (["a"] * 90, names(train[1])):
        with pytest.raises(UserError, match="two classes"):
            probe_figures("p", (train[0], labels), (test[0], ["zebra"] * 60))
