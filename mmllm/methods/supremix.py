"""Mixup Your Own Pairs (arXiv 2309.16633).

slug: supremix
number: 60
shelf: 1
kind: objective
config: "objectives: [{type: supremix, options: {streams: [image], label: size}}]  # meta.size of the records: a number"
left_out: the age and brain datasets, and the fine-tuning of a regressor after the contrastive stage.
differs: released code takes the largest score off real and mixed pairs separately, which shifts them against each
  other; here all terms stand in one log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mmllm.align.item_rows import item_losses, stacked_rows
from mmllm.contracts import AlignBatch, Objective
from mmllm.errors import UserError
from mmllm.registry import register
from mmllm.report.figures import Figure

if TYPE_CHECKING:
    from mmllm.align.config import MeasureConfig
    from mmllm.train.align import AlignStage


def weighted_supcon(logits: Tensor, positive: Tensor, log_weight: Tensor, allow: Tensor) -> Tensor:
    """``-1 / (|P_i| + 1) sum_p [z_ip - log sum_a w_ia exp z_ia]`` of each row; [R] (section 3.3).

    Args:
        logits, log_weight: [R, C].
        positive, allow: [R, C] bool; pairs that are not allowed are in neither sum. A row without positive has loss 0.
    """
    positive = positive & allow
    count = positive.sum(1)
    total = (logits + log_weight).masked_fill(~allow, torch.finfo(logits.dtype).min).logsumexp(1)
    return (count * total - logits.masked_fill(~positive, 0.0).sum(1)) / (count + 1)


@register("objective", "supremix")
class SupReMix(Objective):
    """Supervised contrast for ordinal labels with mixtures of embeddings as hard negatives and positives.

    Rows are the embeddings of the streams, one stream's two views or several modalities; equal labels are positives.

    Args:
        streams: whose rows are contrasted; of a single one a second view ``STREAM@mixed`` is made.
        label: field of ``meta`` that holds the number; records without it take no part.
        unit: labels are divided by it, so that 1 is a step that matters.
        temperature: of the softmax.
        gap: a mixed positive of row i comes from labels less than this below and above its own.
        concentration: a and b of the Beta distribution that draws the anchor's share of a mixed negative.
        mix_negatives: mixtures of the anchor with each row of another label (anchor-inclusive).
        mix_positives: mixtures of a lower and a higher row that have the anchor's label (anchor-exclusive); memory
            grows with the cube of the rows.
        magnify: weigh each term of the denominator by its distance in label plus 1.
    """

    def __init__(
        self,
        streams: Sequence[str],
        label: str,
        unit: float = 1.0,
        temperature: float = 0.3,
        gap: float = 5.0,
        concentration: Sequence[float] = (2.0, 8.0),
        mix_negatives: bool = True,
        mix_positives: bool = True,
        magnify: bool = True,
    ):
        super().__init__()
        for name, value in (("unit", unit), ("temperature", temperature), ("gap", gap)):
            if value <= 0:
                raise UserError(f"{name} must be above 0 (got {value})", "objective 'supremix'")
        if not streams or len(concentration) != 2 or min(concentration) <= 0:
            raise UserError("streams must name one, and concentration two numbers above 0", "objective 'supremix'")
        self.rows = list(streams)
        if len(self.rows) == 1:
            view = f"{self.rows[0]}@mixed"
            self.streams = {view: {"of": self.rows[0]}}
            self.rows.append(view)
        self.label, self.unit, self.temperature, self.gap = label, unit, temperature, gap
        self.a, self.b = map(float, concentration)
        self.mix_negatives, self.mix_positives, self.magnify = mix_negatives, mix_positives, magnify
        self.needs = frozenset({f"meta.{label}", *(f"{s}.embedding" for s in self.rows)})

    def forward(self, batch: AlignBatch) -> dict[str, Tensor]:
        rows, owner = stacked_rows(batch, self.rows)
        values = [_number(m, self.label) for m in batch.extras.get("meta") or []]
        label = torch.tensor(values, device=rows.device)[owner] / self.unit
        known = label.isfinite()
        share = np.random.default_rng((60, batch.step)).beta(self.a, self.b, (len(rows), len(rows)))
        each = self.loss(rows[known], label[known], torch.from_numpy(share).to(rows)[known][:, known])
        return item_losses(each, owner[known], len(batch))

    def loss(self, z: Tensor, y: Tensor, share: Tensor) -> Tensor:
        """The loss of every row as an anchor; [N].

        Args:
            z: [N, D] unit vectors; y: [N] labels.
            share: [N, N], how much of anchor i there is in its mixture with row k.
        """
        count, same = len(z), y[:, None] == y[None]
        alike = z @ z.T
        logits, positive = [alike], [same]
        allow = [~torch.eye(count, dtype=torch.bool, device=z.device)]
        distance = [(y[:, None] - y[None]).abs()]
        still = z @ z.detach().T  # to what is mixed goes no gradient
        if self.mix_negatives:
            logits.append(share * still.diagonal()[:, None] + (1 - share) * still)
            positive.append(torch.zeros_like(same))
            allow.append(~same)
            distance.append((1 - share) * distance[0])
        if self.mix_positives:
            lower, ratio = self.mixed_positives(y)
            logits.append((ratio * still[:, :, None] + (1 - ratio) * still[:, None]).flatten(1))
            positive.append(lower.flatten(1))
            allow.append(lower.flatten(1))
            distance.append(torch.zeros_like(logits[-1]))
        weight = torch.cat(distance, 1) * self.magnify + 1
        terms = torch.cat(logits, 1) / self.temperature
        return weighted_supcon(terms, torch.cat(positive, 1), weight.log(), torch.cat(allow, 1))

    def mixed_positives(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Which (i, j, k) give a mixed positive, [N, N, N] bool, and the share of row j in it: its label is y_i."""
        below = y[:, None] - y[None]
        lower, higher = (below > 0) & (below < self.gap), (below < 0) & (-below < self.gap)
        chosen = lower[:, :, None] & higher[:, None]
        span = (y[None] - y[:, None])[None].masked_fill(~chosen, 1.0)
        return chosen, (-below[:, None] / span).masked_fill(~chosen, 0.0)


def _number(meta: dict[str, Any], field: str) -> float:
    value = meta.get(field)
    try:
        return float("nan") if value is None else float(value)
    except (TypeError, ValueError):
        raise UserError(f"meta.{field} must be a number (got {value!r})", "objective 'supremix'") from None


@register("measure", "ordinal")
def ordinal(
    stage: AlignStage, measure: MeasureConfig, records: list[dict[str, Any]], penalty: float = 1e-2
) -> list[Figure]:
    """How well ``meta.FIELD``, a number, can be read from embeddings, and how well their distances follow it.

    ``NAME_error``: mean absolute error of a ridge regression fitted to ``train``; chance: always saying the median.
    ``NAME_order``: Spearman's correlation of the distance in the number and the distance in the space, over all pairs.

    Args:
        penalty: of the regression, per training row.
    """
    from mmllm.evaluate.correlation import spearman
    from mmllm.evaluate.stats import derangement, mean_interval
    from mmllm.train.align_measures import stream_rows

    if measure.train is None:
        raise UserError(f"measure '{measure.name}' needs 'train'", do="name the records that it is fitted to")
    sides = []
    for part in (stage.records(measure.train, measure.recipes), records):
        known = [r for r in part if (r.get("meta") or {}).get(measure.field) is not None]
        rows, held = stream_rows(stage, measure, measure.streams[0], known)
        numbers = [_number(known[i]["meta"], measure.field) for i in held]
        sides.append((rows.double(), torch.tensor(numbers, dtype=torch.float64)))
    (x, y), (query, truth) = sides
    if len(x) < 2 or len(query) < 2:
        return [Figure(measure.name, None, note=f"fewer than two records with meta.{measure.field}")]
    error = (ridge(x, y, penalty, query) - truth).abs()
    swapped = (ridge(x, y, penalty, query)[derangement(len(query), stage.config.train.seed)] - truth).abs()
    value, low, high = mean_interval(error.numpy())
    control, c_low, c_high = mean_interval(swapped.numpy())
    chance = float((truth - y.median()).abs().mean())
    pairs = torch.triu_indices(len(query), len(query), 1)
    apart = (truth[pairs[0]] - truth[pairs[1]]).abs(), (query[pairs[0]] - query[pairs[1]]).norm(dim=-1)
    order = spearman(*(v.numpy() for v in apart))
    return [
        Figure(
            f"{measure.name}_error", value, "lower", low, high, len(query), None, control, c_low, c_high, chance,
            note=f"mean absolute error of meta.{measure.field}",
        ),
        Figure(f"{measure.name}_order", order, "higher", n=len(query), note="Spearman, distance against distance"),
    ]  # fmt: skip


def ridge(x: Tensor, y: Tensor, penalty: float, query: Tensor) -> Tensor:
    """Ridge regression of [N] numbers on [N, D] rows around their means, at [M, D] queries; [M]."""
    mean, centred = x.mean(0), x - x.mean(0)
    gram = centred.T @ centred + penalty * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
    return (query - mean) @ torch.linalg.solve(gram, centred.T @ (y - y.mean())) + y.mean()
