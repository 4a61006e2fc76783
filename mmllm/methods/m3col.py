"""Harnessing Shared Relations via Multimodal Mixup Contrastive Learning for Multimodal Classification (arXiv 2409.17777).

slug: m3col
number: 18
shelf: 1
kind: objective
config: "objectives: [{type: m3col, options: {pair: [image, text], field: subgroup, classes: [square, bar]}}]"
left_out: mixing of input pictures and texts; more than two modalities are one such term for each pair.
differs: the released code writes a mixed target over the one of a row that is mixed with itself, which loses the row;
  the shares add up here. Soft targets carry no gradient here.
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmllm.blocks.items import item_rows
from mmllm.contracts import AlignBatch, Objective
from mmllm.errors import UserError
from mmllm.evaluate.stats import mean_interval
from mmllm.registry import register
from mmllm.report.figures import Figure

WHERE = "objective 'm3col'"


@register("objective", "m3col")
class M3CoL(Objective):
    """Classes from two streams and from both together, with a contrast of mixed items (section 3).

    The loss is the cross-entropy of three classifiers (either stream, both) plus ``contrast_weight`` times the
    contrast: MixNCE in both orders for the first ``mix_share`` of the phase, and then soft CLIP.

    Args:
        classes: names of the classes; None leaves the contrast alone. Items of another class have no such loss.
        field: where an item's class stands: ``label``, or a field of ``meta``.
        mix_share: 1 never changes to soft CLIP, 0 begins with it.
        p: chance of a row to be mixed with another; 0 makes MixNCE plain InfoNCE.
        alpha: both parameters of the Beta distribution of shares.
        temperature: of MixNCE; ``soft_temperature`` of soft CLIP.
        hidden: width of the classifier of both streams.
        seed: of the mixing, which is a function of it and the step.
    """

    def __init__(
        self,
        pair: Sequence[str],
        classes: Sequence[str] | None = None,
        field: str = "label",
        contrast_weight: float = 0.1,
        mix_share: float = 0.33,
        p: float = 0.5,
        alpha: float = 0.15,
        temperature: float = 0.1,
        soft_temperature: float = 0.125,
        hidden: int = 256,
        seed: int = 0,
    ):
        super().__init__()
        if len(pair) != 2:
            raise UserError(f"a pair has two streams (got {list(pair)})", WHERE)
        if classes is not None and len(set(classes)) < 2:
            raise UserError("classes must be at least two names", WHERE)
        for name, value in (("alpha", alpha), ("temperature", temperature), ("soft_temperature", soft_temperature)):
            if value <= 0:
                raise UserError(f"{name} must be above 0 (got {value})", WHERE)
        for name, value in (("p", p), ("mix_share", mix_share)):
            if not 0 <= value <= 1:
                raise UserError(f"{name} must be within 0..1 (got {value})", WHERE)
        self.pair, self.field, self.hidden, self.seed = (str(pair[0]), str(pair[1])), field, hidden, seed
        self.classes = [str(c) for c in classes or ()]
        self.index = {name: i for i, name in enumerate(self.classes)}
        self.contrast_weight, self.mix_share, self.p, self.alpha = contrast_weight, mix_share, p, alpha
        self.temperature, self.soft_temperature = temperature, soft_temperature
        about = [] if classes is None else ["labels" if field == "label" else f"meta.{field}"]
        self.needs = frozenset([f"{s}.embedding" for s in pair] + about)

    def setup(self, model: Any) -> None:
        dim, count = model.embedding_dim, len(self.classes)
        if count:
            self.single = nn.ModuleList([nn.Linear(dim, count), nn.Linear(dim, count)])
            layers: list[nn.Module] = [nn.Linear(2 * dim, self.hidden), nn.ReLU(), nn.Linear(self.hidden, self.hidden)]
            self.fused = nn.Sequential(*layers, nn.ReLU(), nn.Linear(self.hidden, count))

    def forward(self, batch: AlignBatch) -> dict[str, Tensor]:
        (a, has_a), (b, has_b) = (self.rows(batch, s) for s in self.pair)
        both = has_a & has_b
        contrast = self.contrast(a[both], b[both], batch) if bool(both.any()) else (a.sum() + b.sum()) * 0.0
        out = {"contrast": contrast}
        loss = self.contrast_weight * contrast
        if self.classes:
            target = self.targets(batch).to(a.device)
            logits = [self.single[0](a), self.single[1](b), self.fused(torch.cat([a, b], 1))]
            for name, z, there in zip((*self.pair, "fused"), logits, (has_a, has_b, has_a | has_b)):
                counts = there & (target >= 0)
                each = F.cross_entropy(z, target.clamp(min=0), reduction="none")
                out[f"classes/{name}"] = (each * counts).sum() / counts.sum().clamp(min=1)
                loss = loss + out[f"classes/{name}"]
        return {"loss": loss, **out}

    def rows(self, batch: AlignBatch, name: str) -> tuple[Tensor, Tensor]:
        """One embedding for each item, [B, P], zero where it has none, and whether it has one, [B] bool."""
        stream = batch.streams[name]
        assert stream.embedding is not None
        return item_rows(stream.embedding, stream.owner, len(batch))

    def targets(self, batch: AlignBatch) -> Tensor:
        """Class number of each item, [B], -1 where it has none of them."""
        if self.field == "label":
            names: list[Any] = list(batch.labels or [""] * len(batch))
        else:
            names = [m.get(self.field) for m in batch.extras["meta"]]
        return torch.tensor([self.index.get(str(n), -1) for n in names])

    def contrast(self, a: Tensor, b: Tensor, batch: AlignBatch) -> Tensor:
        """Scalar: equations 3 to 6 for the embeddings [N, P] of items that have both streams."""
        if batch.progress >= self.mix_share < 1:
            t = self.soft_temperature
            return soft_clip(a, b, t, t) + soft_clip(b, a, t, t)
        generator = torch.Generator().manual_seed(hash((self.seed, batch.step)) % 2**62)
        total = a.new_zeros(())
        for x, y in ((b, a), (a, b)):
            share, partner = (v.to(a.device) for v in self.draw(len(x), generator))
            total = total + mix_nce(mixed(x, share, partner), y, share, partner, self.temperature)
        return total

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Each row's share of itself [N] (1 where it is not mixed) and the row that it is mixed with [N]."""
        # Beta(a, a) as x / (x + y) of two Gamma(a) draws, which take a generator.
        shape = torch.full((2, count), self.alpha, dtype=torch.float64)
        gamma = torch._standard_gamma(shape, generator=generator)  # pyright: ignore[reportPrivateImportUsage]
        share = (gamma[0] / gamma.sum(0).clamp(min=1e-300)).float()
        kept = torch.rand(count, generator=generator) >= self.p
        return share.masked_fill(kept, 1.0), torch.randperm(count, generator=generator)


def mixed(x: Tensor, share: Tensor, partner: Tensor) -> Tensor:
    """share * x + (1 - share) * x[partner]; [N, P] (equation 1)."""
    return share[:, None] * x + (1 - share)[:, None] * x[partner]


def mix_targets(share: Tensor, partner: Tensor) -> Tensor:
    """[N, N]: ``share`` on the diagonal and the rest at ``partner``; a row mixed with itself keeps all."""
    return torch.diag(share).scatter_add(1, partner[:, None], (1 - share)[:, None])


def mix_nce(x: Tensor, y: Tensor, share: Tensor, partner: Tensor, temperature: float) -> Tensor:
    """Mean over both directions of the cross-entropy of mixed rows x [N, P] against plain y [N, P] (equation 3)."""
    logits = F.normalize(x, dim=-1) @ F.normalize(y, dim=-1).T / temperature
    target = mix_targets(share, partner)
    rows = -(target * logits.log_softmax(1)).sum(1).mean()
    columns = -(target * logits.log_softmax(0)).sum(0).mean()
    return 0.5 * (rows + columns)


def soft_clip(x: Tensor, y: Tensor, temperature: float, target_temperature: float) -> Tensor:
    """Contrast of unit rows x with y, [N, P], towards the similarities of y's rows to each other (equation 5)."""
    target = (y @ y.T / target_temperature).softmax(1).detach()
    logits = x @ y.T / temperature
    return -0.5 * ((target * logits.log_softmax(1)).sum(1) + (target * logits.T.log_softmax(1)).sum(1)).mean()


@register("measure", "m3col_classes")
def m3col_classes(stage: Any, measure: Any, records: list[dict[str, Any]]) -> list[Figure]:
    """Accuracy of the classifiers that the last phase with this objective trained: of either stream, and of both.

    Raises:
        UserError: no phase has trained them.
    """
    from mmllm.train.align_measures import class_of, stream_rows

    found = [o for step in stage.steps.values() for o in step.objectives if isinstance(o, M3CoL) and o.classes]
    if not found:
        raise UserError("no phase trains the objective 'm3col' with classes", f"measure '{measure.name}'")
    objective = found[-1]
    truth = torch.tensor([objective.index.get(class_of(r, objective.field), -1) for r in records])
    sides = []
    for stream in objective.pair:
        rows, held = stream_rows(stage, measure, stream, records)
        sides.append(item_rows(rows, torch.tensor(held), len(records)))
    (a, has_a), (b, has_b) = sides
    with torch.no_grad():
        objective.to(a.device)
        logits = [objective.single[0](a), objective.single[1](b), objective.fused(torch.cat([a, b], 1))]
    out = []
    for name, z, there in zip((*objective.pair, "fused"), logits, (has_a, has_b, has_a | has_b)):
        asked = there & (truth >= 0)
        title, target = f"{measure.name}_{name}", truth[asked]
        if not len(target):
            out.append(Figure(title, None, note="no record of a known class"))
            continue
        hits = (z[asked].argmax(1) == target).double().numpy()
        clusters = [str(r.get("label") or r["id"]) for r, k in zip(records, asked.tolist()) if k]
        value, low, high = mean_interval(hits, clusters, 0)
        chance = float(torch.bincount(target).max()) / len(target)
        out.append(Figure(title, value, "higher", low, high, len(target), "fraction", chance=chance))
    return out
