"""What a simple classifier reads out of frozen embeddings: nearest neighbours and a linear probe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmllm.contracts import Scorer
from mmllm.errors import UserError
from mmllm.evaluate.search import nearest
from mmllm.evaluate.stats import mean_interval
from mmllm.report.figures import Figure

PENALTIES = (1e-6, 1e-4, 1e-2, 1.0)


def knn_classify(
    train: Tensor,
    labels: Tensor,
    test: Tensor,
    k: int = 20,
    temperature: float | None = 0.07,
    scorer: Scorer | None = None,
) -> Tensor:
    """Class of each test row by its k nearest training rows; [M] long. A tie goes to the smaller class number.

    Args:
        train: [N, D]; labels: [N] long; test: [M, D].
        temperature: neighbours vote with exp(similarity / temperature) (arXiv 1805.01978); None: one vote each.
    """
    scores, index = nearest(test, train, min(k, len(train)), scorer)
    votes = torch.ones_like(scores) if temperature is None else torch.exp((scores - scores[:, :1]) / temperature)
    tally = torch.zeros(len(test), int(labels.max()) + 1, dtype=torch.float64)
    tally.scatter_add_(1, labels[index], votes.double())
    return tally.argmax(1)


class LinearProbe:
    """Multinomial logistic regression: mean cross-entropy + penalty / 2 * ||W||^2, solved to convergence by LBFGS.

    Attributes:
        weight: [C, D]; bias: [C], not penalised.
    """

    def __init__(self, weight: Tensor, bias: Tensor):
        self.weight, self.bias = weight, bias

    @classmethod
    def fit(cls, x: Tensor, labels: Tensor, penalty: float = 1e-4, classes: int | None = None) -> LinearProbe:
        """x: [N, D]; labels: [N] long."""
        x = x.detach().double().cpu()
        count = int(labels.max()) + 1 if classes is None else classes
        weight = torch.zeros(count, x.shape[1], dtype=torch.float64, requires_grad=True)
        bias = torch.zeros(count, dtype=torch.float64, requires_grad=True)
        solver = torch.optim.LBFGS(
            [weight, bias], max_iter=1000, tolerance_grad=1e-8, tolerance_change=1e-12, history_size=20,
            line_search_fn="strong_wolfe",
        )  # fmt: skip

        def loss() -> Tensor:
            solver.zero_grad()
            value = F.cross_entropy(x @ weight.T + bias, labels) + penalty / 2 * weight.square().sum()
            value.backward()
            return value

        solver.step(loss)
        return cls(weight.detach(), bias.detach())

    @classmethod
    def search(
        cls, x: Tensor, labels: Tensor, penalties: Sequence[float] = PENALTIES, seed: int = 0
    ) -> tuple[LinearProbe, float]:
        """The probe with the penalty that does best on a held-out fifth of the training rows, fitted on all of them."""
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
        held, rest = order[: max(1, len(x) // 5)], order[max(1, len(x) // 5) :]
        classes = int(labels.max()) + 1
        hits = []
        for penalty in penalties:
            probe = cls.fit(x[rest], labels[rest], penalty, classes)
            hits.append(int((probe.predict(x[held]) == labels[held]).sum()))
        best = penalties[max(range(len(hits)), key=lambda i: (hits[i], penalties[i]))]
        return cls.fit(x, labels, best, classes), best

    def predict(self, x: Tensor) -> Tensor:
        """Most probable class of each row of [M, D]."""
        return (x.detach().double().cpu() @ self.weight.T + self.bias).argmax(1)


def probe_figures(
    name: str,
    train: tuple[Tensor, Sequence[Any]],
    test: tuple[Tensor, Sequence[Any]],
    clusters: Sequence[Any] | None = None,
    seed: int = 0,
) -> list[Figure]:
    """``NAME_knn`` and ``NAME_linear``: accuracy on ``test`` (rows, labels) of what was fitted to ``train``.

    Chance is always naming the largest class; the control is fitted to shuffled labels. Test rows of a class without
    training rows are left out.

    Raises:
        UserError: fewer than two classes to train on, or nothing to test.
    """
    classes = sorted({str(c) for c in train[1]})
    index = {c: i for i, c in enumerate(classes)}
    kept = [i for i, c in enumerate(test[1]) if str(c) in index]
    if len(classes) < 2 or not kept:
        raise UserError("a probe needs two classes with training items, and test items of them", f"measure '{name}'")
    labels = torch.tensor([index[str(c)] for c in train[1]])
    truth = torch.tensor([index[str(test[1][i])] for i in kept])
    shuffled = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]
    x = test[0][kept]
    chance = float(torch.bincount(truth).max() / len(truth))
    probe, penalty = LinearProbe.search(train[0], labels, seed=seed)
    control = LinearProbe.fit(train[0], shuffled, penalty, len(classes))
    own = {"knn": knn_classify(train[0], labels, x), "linear": probe.predict(x)}
    other = {"knn": knn_classify(train[0], shuffled, x), "linear": control.predict(x)}
    notes = {"knn": "20 nearest neighbours", "linear": f"penalty {penalty:g}"}
    groups = None if clusters is None else [clusters[i] for i in kept]
    out = []
    for kind, predicted in own.items():
        value, low, high = mean_interval((predicted == truth).numpy(), groups, seed)
        base, base_low, base_high = mean_interval((other[kind] == truth).numpy(), groups, seed)
        out.append(
            Figure(
                f"{name}_{kind}", value, "higher", low, high, len(kept), "fraction", base, base_low, base_high, chance,
                note=f"{len(classes)} classes, {notes[kind]}",
            )
        )  # fmt: skip
    return out
