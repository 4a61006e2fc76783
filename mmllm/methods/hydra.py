"""Rethinking Positive Pairs in Contrastive Learning (arXiv 2410.18200).

slug: hydra
number: 38
shelf: 1
kind: objective
config: "objectives: [{type: hydra, options: {pair: [image, 'image@view']}}]  # records with labels"
left_out: "the LayerNorm at the end of the projector (the head of a stream ends with a linear layer), and the classifier
  on detached features, which only watches."
differs: "the temperature is 0.1 in one released version and learned in another; temperature: null learns it."
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmllm.contracts import AlignBatch, Objective
from mmllm.errors import UserError, unknown
from mmllm.registry import register

PARTNERS = ("arbitrary", "identical", "distinct")
GATES = ("mean", "product", "open")


@register("objective", "hydra")
class Hydra(Objective):
    """Pulls items of two drawn classes together in the features that a gate, learned for the two classes, leaves.

    Each row i of class y_i gets a partner class; its positives are all columns of that class, its negatives those of
    neither class. Every column is seen through the row's gate g in (0, 1)^P, ``cos(g x_i, g z_n) / temperature``, and
    each positive competes with the negatives alone (SimLAP, section 3).

    Args:
        pair: the stream of the rows and that of the columns: two views, two modalities, or one stream twice.
        partner: ``arbitrary`` shuffles the classes of the batch, ``identical`` is the own class, ``distinct`` another.
        gate: from the ``mean`` of the two classes' vectors, the ``product`` of two gates of one class each, or ``open``
            (no gate, which is the paper's baseline).
        temperature: None: the pair's learned ``logit_scale``.
        classes: how many classes there may be; they get their vectors in the order in which they are met.
        width: of the classes' vectors; ``hidden``: of the gate's hidden layer.
        symmetric: half of the loss with the columns as rows.
        seed: of the drawn partners, which also depend on the step.
    """

    known: Tensor

    def __init__(
        self,
        pair: Sequence[str],
        partner: Literal["arbitrary", "identical", "distinct"] = "arbitrary",
        gate: Literal["mean", "product", "open"] = "mean",
        temperature: float | None = 0.1,
        classes: int = 4096,
        width: int = 512,
        hidden: int = 1024,
        symmetric: bool = False,
        seed: int = 0,
    ):
        super().__init__()
        if len(pair) != 2:
            raise UserError(f"pair must name two streams (got {list(pair)})", "objective 'hydra'")
        for value, valid, name in ((partner, PARTNERS, "partner"), (gate, GATES, "gate")):
            if value not in valid:
                raise unknown(name, value, valid, "objective 'hydra'")
        if temperature is not None and temperature <= 0:
            raise UserError(f"temperature must be above 0 (got {temperature})", "objective 'hydra'")
        self.pair, self.partner, self.kind = tuple(pair), partner, gate
        self.temperature, self.width, self.hidden = temperature, width, hidden
        self.symmetric, self.seed = symmetric, seed
        self.needs = frozenset({*(f"{s}.embedding" for s in pair), "labels"})
        self.register_buffer("known", torch.full((classes,), -1))
        self.table = nn.Embedding(classes, width) if gate != "open" else None
        self.gate: nn.Module | None = None

    @property
    def pair_name(self) -> str:
        return ":".join(self.pair)

    def setup(self, model: nn.Module) -> None:
        if self.kind != "open":
            self.gate = nn.Sequential(
                nn.ReLU(), nn.BatchNorm1d(self.width), nn.Linear(self.width, self.hidden),
                nn.ReLU(), nn.BatchNorm1d(self.hidden), nn.Linear(self.hidden, int(model.embedding_dim)),  # type: ignore[arg-type]
            )  # fmt: skip

    def forward(self, batch: AlignBatch) -> dict[str, Tensor]:
        assert batch.label_ids is not None
        classes = self.numbers(batch.label_ids)
        scale = 1 / self.temperature if self.temperature else batch.logit_scale[self.pair_name]
        orders = [self.pair, self.pair[::-1]] if self.symmetric else [self.pair]
        found = [self._one(batch, a, b, classes, scale) for a, b in orders]
        valid = torch.stack([v for _, v in found]).all(0)
        return {"loss": torch.stack([loss for loss, _ in found]).mean(0), "valid": valid}

    def _one(
        self, batch: AlignBatch, rows: str, cols: str, classes: Tensor, scale: Tensor | float
    ) -> tuple[Tensor, Tensor]:
        """Loss of each item, [B], and whether it has one."""
        a, b, size = batch.streams[rows], batch.streams[cols], len(classes)
        assert a.embedding is not None and b.embedding is not None
        everyone = torch.arange(size, device=classes.device)
        own, theirs = (everyone if s.owner is None else s.owner.to(classes.device) for s in (a, b))
        partner, has = self.partners(classes, theirs, batch.step)
        gate = self.gates(classes[own], partner[own], a.embedding.shape[1])
        logits = scale * gated_cosine(a.embedding, b.embedding, gate)
        each = pair_loss(logits, classes[own], partner[own], classes[theirs])
        total = each.new_zeros(size).index_add(0, own, each)
        count = torch.bincount(own, minlength=size)
        return total / count.clamp(min=1), has & (count > 0)

    def numbers(self, label_ids: Tensor) -> Tensor:
        """Class numbers [B] of label ids [B]; new ones take the next free rows of the table.

        Raises:
            UserError: more classes than ``classes``.
        """
        ids = label_ids.to(self.known.device)
        new = ids.unique()
        new = new[~torch.isin(new, self.known)]
        count = int((self.known >= 0).sum())
        if count + len(new) > len(self.known):
            do = "raise its option classes"
            raise UserError(f"more than {len(self.known)} classes of labels", "objective 'hydra'", do)
        self.known[count : count + len(new)] = new
        return (ids[:, None] == self.known).int().argmax(1)

    def partners(self, classes: Tensor, owners: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """The partner class of each item, [B], among those of ``owners`` (items that have columns), and whether it has
        one; a function of the seed and the step."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        here = owners.unique().cpu()
        size, none = len(classes), torch.zeros(len(classes), dtype=torch.bool, device=classes.device)
        if not len(here):
            return classes, none
        if self.partner == "identical":
            return classes, torch.isin(classes, classes[here])
        if self.partner == "arbitrary":
            order = torch.randperm(len(here), generator=generator).repeat(-(-size // len(here)))[:size]
            return classes[here[order]], ~none
        names = classes.cpu()
        other = (names[:, None] != names[here][None]).float()
        has = other.any(1)
        drawn = torch.multinomial(other + ~has[:, None], 1, generator=generator)[:, 0]
        return classes[here[drawn]], has.to(classes.device)

    def gates(self, first: Tensor, second: Tensor, size: int) -> Tensor:
        """Gates [R, P] of pairs of classes [R], [R]; the order of the two does not matter."""
        if self.kind == "open" or self.table is None or self.gate is None:
            return torch.ones(len(first), size, device=first.device)
        if self.kind == "mean":
            return torch.sigmoid(self.gate((self.table(first) + self.table(second)) / 2))
        both = torch.sigmoid(self.gate(self.table(torch.cat([first, second]))))
        return both[: len(first)] * both[len(first) :]


def gated_cosine(rows: Tensor, cols: Tensor, gate: Tensor) -> Tensor:
    """Cosine [R, C] of ``gate_i * row_i`` and ``gate_i * col_n``; rows and gates [R, P], columns [C, P]."""
    squared = gate.square()
    dot = (rows * squared) @ cols.T
    lengths = (rows * gate).norm(dim=-1)[:, None] * (squared @ cols.square().T).clamp(min=1e-12).sqrt()
    return dot / lengths.clamp(min=1e-12)


def pair_loss(logits: Tensor, own: Tensor, partner: Tensor, theirs: Tensor) -> Tensor:
    """Mean over a row's positives (columns of its partner class) of ``log(e^l + sum_neg e^l_n) - l``; [R].

    Args:
        logits: [R, C].
        own, partner: classes of each row and of its partner, [R].
        theirs: class of each column, [C]; columns of the own class are no negatives.
    """
    positive = theirs[None] == partner[:, None]
    negative = ~positive & (theirs[None] != own[:, None])
    rest = logits.masked_fill(~negative, -torch.inf).logsumexp(1, keepdim=True)
    each = F.softplus(rest - logits)
    return (each * positive).sum(1) / positive.sum(1).clamp(min=1)
