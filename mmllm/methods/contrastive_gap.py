"""It's Not a Modality Gap: Characterizing and Addressing the Contrastive Gap (arXiv 2405.18570).

slug: contrastive-gap
number: 17
shelf: 1
kind: objective
config: "objectives: [{type: contrastive_gap, options: {pair: [image, text], cross_uniformity: 1.0}}]"
left_out: fine-tuning of CLIP on COCO; a vector's distance to itself counts in no mean, which shifts the loss by a
  constant alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from mmllm.align.objectives import InfoNCE
from mmllm.align.reading import FIELD
from mmllm.align.record_keys import texts_of
from mmllm.blocks.tiled_contrast import contrast
from mmllm.contracts import AlignBatch
from mmllm.errors import UserError
from mmllm.evaluate.probes import LinearProbe
from mmllm.evaluate.stats import mean_interval
from mmllm.registry import register
from mmllm.report.figures import Figure


@register("objective", "contrastive_gap")
class ContrastiveGap(InfoNCE):
    """InfoNCE with the terms that close the gap between two streams: uniformity and alignment (section 5).

    With U(x, y) = log mean exp(-2 ||x_j - y_k||^2) over pairs of different items (of different labels, with
    ``same_label``), the loss adds ``(U(a, a) + U(b, b)) / 2``, the mean squared distance of what belongs together, and
    U(a, b), each by its weight. The defaults are the paper's CUA; ``cross_uniformity: 1`` makes it CUAXU.

    Args:
        contrast: weight of InfoNCE; 0 leaves the other terms, to be added to another loss.
        temperature: fixed one of InfoNCE (0.01 in the paper); None learns it.
    """

    def __init__(
        self,
        pair: Sequence[str],
        same_label: bool = True,
        contrast: float = 1.0,
        uniformity: float = 1.0,
        alignment: float = 1.0,
        cross_uniformity: float = 0.0,
        temperature: float | None = None,
    ):
        super().__init__(pair, same_label)
        if temperature is not None and temperature <= 0:
            raise UserError(f"temperature must be above 0 (got {temperature})", "objective 'contrastive_gap'")
        self.weights = {"uniformity": uniformity, "alignment": alignment, "cross_uniformity": cross_uniformity}
        self.contrast, self.temperature = contrast, temperature
        self.gathered = True  # every pair of the batch counts in the uniformity

    def loss(self, rows: Any, cols: Any, batch: AlignBatch, **how: Any) -> Tensor:
        if self.temperature is None:
            return super().loss(rows, cols, batch, **how)
        # The learned temperature has no part in it, and yet a gradient in every process.
        return contrast(rows, cols, scale=1 / self.temperature, **how) + 0.0 * batch.logit_scale[self.pair_name]

    def forward(self, batch: AlignBatch) -> dict[str, Tensor]:
        out: dict[str, Tensor] = dict(super().forward(batch)) if self.contrast else {}
        valid = out.get("valid", torch.ones(len(batch), dtype=torch.bool))
        near = out["loss"] if out else torch.zeros(len(batch))
        total = self.contrast * (near * valid.to(near)).sum() / valid.sum().clamp(min=1)
        terms = self.terms(batch)
        total = total + sum(self.weights[name] * value for name, value in terms.items())
        return {"loss": total, **terms}

    def terms(self, batch: AlignBatch) -> dict[str, Tensor]:
        """``uniformity``, ``alignment`` and ``cross_uniformity``, each a scalar and 0 where it has no pair."""
        (a, own), (b, theirs) = (self._rows(batch, s) for s in self.pair)
        own, theirs = (torch.arange(len(x), device=x.device) if o is None else o for x, o in ((a, own), (b, theirs)))
        apart = self._apart(batch, a.device)
        inside = (uniformity(x, x, apart[o][:, o]) for x, o in ((a, own), (b, theirs)))
        together = own[:, None] == theirs[None]
        squared = (2 - 2 * a @ b.T).clamp(min=0)
        rows_of = together.sum() if bool(together.any()) else torch.ones((), device=a.device)
        return {
            "uniformity": 0.5 * sum(inside),  # type: ignore[dict-item]
            "alignment": (squared * together).sum() / rows_of,
            "cross_uniformity": uniformity(a, b, apart[own][:, theirs]),
        }

    def _apart(self, batch: AlignBatch, device: torch.device) -> Tensor:
        """[B, B] bool: pairs of different items that are not said to be the same thing."""
        apart = ~torch.eye(len(batch), dtype=torch.bool, device=device)
        if not self.same_label:
            return apart
        if batch.label_ids is not None:
            names = batch.label_ids.to(device)
            return apart & (names[:, None] != names[None])
        if batch.labels is not None:
            return apart & torch.tensor([[x != y for y in batch.labels] for x in batch.labels], device=device)
        return apart


def uniformity(x: Tensor, y: Tensor, pairs: Tensor) -> Tensor:
    """log mean exp(-2 ||x_j - y_k||^2) of unit vectors [N, P] and [M, P] over the ``pairs`` [N, M]; 0 without any.

    arXiv 2005.10242, equation 2.
    """
    if not bool(pairs.any()):
        return (x.sum() + y.sum()) * 0.0
    exponent = (4 * x @ y.T - 4)[pairs]
    return exponent.logsumexp(0) - torch.tensor(float(len(exponent))).log()


@register("measure", "separability")
def separability(stage: Any, measure: Any, records: list[dict[str, Any]]) -> list[Figure]:
    """How well a line tells two streams apart: accuracy on held-out items of a linear classifier, 0.5 where it cannot.

    It is fitted to every second record that has both streams (with its first text) and asked about the others.
    """
    from mmllm.train.align_measures import stream_rows

    out = []
    for a, b in combinations(measure.streams, 2):
        fields = [FIELD[stage.model.tower(s).modality] for s in (a, b)]
        both = [{**r, "text": texts_of(r)[:1]} for r in records if all(r.get(f) or f == "text" for f in fields)]
        x, y = (stream_rows(stage, measure, s, both)[0] for s in (a, b))
        name = f"{measure.name}_{a}_{b}_separability"
        if len(both) < 4:
            out.append(Figure(name, None, "lower", note="fewer than four records with both"))
            continue
        hits = linearly_separated(x, y)
        value, low, high = mean_interval(hits.double().numpy(), None, 0)
        out.append(Figure(name, value, "lower", low, high, len(hits), "fraction", chance=0.5, note="linear classifier"))
    return out


def linearly_separated(x: Tensor, y: Tensor, penalty: float = 1e-4) -> Tensor:
    """[N] bool: which held-out rows of [N, P] and [N, P] a linear classifier gives to their own stream."""
    fit, held = ([*x[k::2], *y[k::2]] for k in (0, 1))
    sides = [torch.tensor([0] * len(x[k::2]) + [1] * len(y[k::2])) for k in (0, 1)]
    probe = LinearProbe.fit(torch.stack(fit), sides[0], penalty, 2)
    return probe.predict(torch.stack(held)) == sides[1]
