"""FDT: Revisiting Multimodal Representation in Contrastive Learning (arXiv 2303.14865).

slug: fdt
number: 1
shelf: 1
kind: objective
config: |
  objectives: [{type: fdt, options: {pair: [image, text]}}]
  # and either stream has a connector {type: fdt, codes: 256, temperature: 100}
left_out: the DeCLIP parts (SimSiam, masked words, nearest neighbours), which are losses of their own, and the schedule
  of the temperature, which the released configs hold constant.
differs: the released code gives padding a score of 0 before the maximum, so that padding is a floor; here it takes no
  part. It keeps the logarithm of the logit scale within 3 to 6; here the scale is kept at 100 at most as everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmllm.align.config import MeasureConfig
from mmllm.align.model import ready_features
from mmllm.align.objectives import InfoNCE
from mmllm.align.record_keys import texts_of
from mmllm.blocks.sparsemax import sparsemax
from mmllm.connectors.base import FolderConnector
from mmllm.contracts import Features
from mmllm.errors import UserError, unknown
from mmllm.evaluate.stats import derangement
from mmllm.registry import register
from mmllm.report.figures import Figure

ACTIVATIONS = {"sparsemax": sparsemax, "softmax": lambda z: z.softmax(-1), "sigmoid": torch.sigmoid}
POOLS = ("max", "mean", "sum")


@register("connector", "fdt")
class FiniteDiscreteTokens(FolderConnector):
    """One token per item: a sparse mixture of the codes of a codebook that the streams share (section 3.2).

    Each token's query scores all codes, ``<q, C> / (sqrt(D) T)``; the scores are pooled over the tokens and turned into
    weights of the codes.

    Args:
        codes: M, size of the codebook; its vectors [M, out_dim] start normally distributed.
        temperature: T, which must grow with M: at the start a fifth of the codes or more should be active, or too few
            ever get a gradient. 1000 suits 16,384 codes, 100 suits 256.
        pool: ``max``, ``mean`` or ``sum`` over the tokens.
        activation: ``sparsemax``, ``softmax`` or ``sigmoid``.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        codes: int = 16384,
        temperature: float = 1000.0,
        pool: str = "max",
        activation: str = "sparsemax",
    ):
        where = "connector 'fdt'"
        if codes < 1 or temperature <= 0:
            raise UserError(f"codes and temperature must be above 0 (got {codes}, {temperature})", where)
        if pool not in POOLS:
            raise unknown("pool", pool, POOLS, where)
        if activation not in ACTIVATIONS:
            raise unknown("activation", activation, ACTIVATIONS, where)
        super().__init__(
            "fdt", in_dim, out_dim, codes=codes, temperature=temperature, pool=pool, activation=activation
        )
        self.temperature, self.pool, self.activation = temperature, pool, activation
        self.query = nn.Sequential(
            nn.LayerNorm(in_dim),
            nn.Linear(in_dim, out_dim),
            nn.GELU(),
            nn.LayerNorm(out_dim),
            nn.Linear(out_dim, out_dim),
        )
        self.codebook = nn.Parameter(torch.randn(codes, out_dim))

    def weights(self, features: Features) -> Tensor:
        """[B, M]: how much each code is active in each item."""
        tokens, mask = self.content(features)
        scores = self.query(tokens) @ self.codebook.T / (self.out_dim**0.5 * self.temperature)
        mask = mask.bool()[..., None]
        if self.pool == "max":
            pooled = scores.masked_fill(~mask, -torch.inf).amax(1)
        else:
            pooled = (scores * mask).sum(1)
            pooled = pooled / mask.sum(1).clamp(min=1) if self.pool == "mean" else pooled
        return ACTIVATIONS[self.activation](pooled.float())

    def forward(self, features: Features, text: Features | None = None) -> tuple[Tensor, Tensor]:
        weights = self.weights(features)
        token = F.normalize(weights @ self.codebook.to(weights.dtype), dim=-1)[:, None]
        return token.to(self.codebook.dtype), torch.ones(token.shape[:2], dtype=torch.bool, device=token.device)

    def num_tokens(self, grid_or_length: Any) -> int:
        return 1


@register("objective", "fdt")
class Fdt(InfoNCE):
    """InfoNCE of two streams whose connectors are ``fdt``; it lets them share one codebook (equation 4).

    Args:
        pair: the two streams.
        shared: False gives each stream a codebook of its own, with nothing in common at the start.
    """

    def __init__(self, pair: Sequence[str], same_label: bool = True, label_smoothing: float = 0.0, shared: bool = True):
        # One token per item: late interaction of these is the cosine.
        super().__init__(pair, same_label, label_smoothing, scorer="late_interaction")
        self.shared = shared

    def setup(self, model: Any) -> None:
        found = [model.connectors[model.owner(s, "connector")] for s in self.pair]
        for stream, connector in zip(self.pair, found):
            if not isinstance(connector, FiniteDiscreteTokens):
                do = f"set streams.{stream}.connector to {{type: fdt}}"
                raise UserError(f"the connector of '{stream}' is no codebook", "objective 'fdt'", do)
        if not self.shared:
            return
        sizes = [tuple(c.codebook.shape) for c in found]
        if sizes[0] != sizes[1]:
            raise UserError(f"the codebooks differ in size: {sizes[0]} and {sizes[1]}", "objective 'fdt'")
        found[1].codebook = found[0].codebook


@register("measure", "fdt_codes")
def fdt_codes(stage: Any, measure: MeasureConfig, records: list[dict[str, Any]]) -> list[Figure]:
    """How many codes are active, and how many of them two streams share: intersection over union of the active codes,
    for the two halves of a record, for halves of different records, and the quotient of the two."""
    a, b = measure.streams[:2]
    weights = [_code_weights(stage, measure, s, records) for s in (a, b)]
    own = overlap(weights[0], weights[1])
    other = overlap(weights[0], weights[1][derangement(len(records), 0)])
    name, n = measure.name, len(records)
    figures = [
        Figure(f"{name}_overlap", own, "higher", n=n, unit="fraction", control=other),
        Figure(f"{name}_overlap_of_others", other, "lower", n=n, unit="fraction"),
        Figure(f"{name}_overlap_ratio", own / max(other, 1e-9), "higher", n=n, unit="times"),
    ]
    for stream, w in zip((a, b), weights):
        figures.append(Figure(f"{name}_active_{stream}", float((w > 0).float().mean()), "lower", n=n, unit="fraction"))
    return figures


def overlap(a: Tensor, b: Tensor) -> float:
    """Mean over the rows of [N, M] weights: codes active in both, of those active in either (Jaccard)."""
    x, y = a > 0, b > 0
    return float(((x & y).sum(-1) / (x | y).sum(-1).clamp(min=1)).mean())


@torch.no_grad()
def _code_weights(stage: Any, measure: MeasureConfig, stream: str, records: list[dict[str, Any]]) -> Tensor:
    """[N, M] weights of the codes of each record's medium or first text."""
    model = stage.model
    tower, connector = model.tower(stream), model.connectors[model.owner(stream, "connector")]
    if tower.modality != "text":
        size = measure.image_size or model.image_size.get(stream)
        found = stage.frozen(tower, records, ["tokens"], image_size=size, name=measure.name, frames=measure.frames)
    parts = []
    for i in range(0, len(records), 128):
        if tower.modality == "text":
            made = model.inputs(stream, [texts_of(r)[0] for r in records[i : i + 128]])
            features = tower(**{k: v.to(stage.device) for k, v in made.items()})
        else:
            features = ready_features({k: v[0, i : i + 128].to(stage.device) for k, v in found.items()})
        parts.append(connector.weights(features).cpu())
    return torch.cat(parts)
