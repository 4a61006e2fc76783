"""TeminAL: Self-Supervised Post-Training of Audio-Language Models with Text-Audio Pairs (arXiv 2408.09269).

slug: teminal
number: 75
shelf: 1
kind: objective
config: "objectives: [{type: teminal, options: {pair: [audio, text]}}]  # of sound_pairs, sampler k_per_group by group"
left_out: the pretrained audio-language model and the sounds of ESC-50. Post-training is a phase of its own, replay a
  second source.
differs: in the parent loss's released code a beta other than 1 weighs half of the forward rows, too; here only the
  reversed rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmllm.align.objectives import PairObjective
from mmllm.blocks.items import item_rows
from mmllm.blocks.tiled_contrast import contrast
from mmllm.contracts import AlignBatch
from mmllm.data.sound_pairs import KINDS, SoundPairs, texts_of_pair
from mmllm.errors import UserError, unknown
from mmllm.registry import register
from mmllm.report.figures import Figure

if TYPE_CHECKING:
    from mmllm.align.config import MeasureConfig
    from mmllm.train.align import AlignStage

FLOOR = 1e-8


@register("objective", "teminal")
class TeminAL(PairObjective):
    """InfoNCE in which the same sounds in another order count as negatives with a weight of their own (section 3.2).

    Items are told apart by ``meta.kind`` (forward, reversed, overlay) and belong to a pair by their ``group``.

    Args:
        same_label: items with the same label are no negatives of each other.
        alpha_same: weight, in the denominator, of the same pair in another kind (its reversed twin).
        alpha_cross: weight of other pairs in another kind. With both 0 each kind is contrasted by itself.
        weights: of the rows of a kind in the mean, 1 unless given; ``reversed`` is the parent paper's beta.
    """

    def __init__(
        self,
        pair: Sequence[str],
        same_label: bool = True,
        alpha_same: float = 1.0,
        alpha_cross: float = 1.0,
        weights: Mapping[str, float] | None = None,
    ):
        super().__init__(pair, same_label)
        self.alpha_same, self.alpha_cross, self.weights = alpha_same, alpha_cross, dict(weights or {})
        for kind in self.weights:
            if kind not in KINDS:
                raise unknown("kind", kind, KINDS, "objective 'teminal', weights")
        if min(alpha_same, alpha_cross, *self.weights.values(), 0) < 0:
            raise UserError("alpha_same, alpha_cross and weights must not be below 0", "objective 'teminal'")
        self.gathered = True  # twins may be anywhere
        self.needs = self.needs | {"meta.kind", "groups"}

    def forward(self, batch: AlignBatch) -> dict[str, Tensor]:
        size, rows, there = len(batch), [], []
        for name in self.pair:
            stream = batch.streams[name]
            assert stream.embedding is not None
            mean, here = item_rows(stream.embedding, stream.owner, size)
            rows.append(F.normalize(mean, dim=-1))
            there.append(here)
        kinds = [str(m.get("kind")) for m in batch.extras.get("meta") or [{}] * size]
        if batch.groups is None:
            raise UserError("records have no group, which tells twins", "objective 'teminal'", "use sound_pairs")
        device = rows[0].device
        kind, group = _numbers(kinds).to(device), _numbers(batch.groups).to(device)
        label = _numbers(batch.labels) if self.same_label and batch.labels is not None else torch.arange(size)
        valid = there[0] & there[1]
        chosen = valid.nonzero().flatten()
        offsets = self.offsets(kind[chosen], group[chosen])
        alike = label.to(device)[chosen]
        allow = (alike[:, None] != alike[None]) | torch.eye(len(chosen), dtype=torch.bool, device=device)
        each = contrast(
            rows[0][chosen], rows[1][chosen], scale=batch.logit_scale[self.pair_name], symmetric=True,
            log_weight_fn=lambda i, j: offsets[i, j], allow_fn=lambda i, j: allow[i, j],
        )  # fmt: skip
        weight = torch.tensor([self.weights.get(k, 1.0) for k in kinds], device=device)[chosen]
        each = each * weight * len(chosen) / weight.sum().clamp(min=FLOOR)
        return {"loss": each.new_zeros(size).index_put((chosen,), each), "valid": valid}

    def offsets(self, kind: Tensor, group: Tensor) -> Tensor:
        """log(alpha) between rows of different kinds, 0 within a kind; [n, n]."""
        same = torch.where(
            group[:, None] == group[None], math.log(self.alpha_same + FLOOR), math.log(self.alpha_cross + FLOOR)
        )
        return same.masked_fill(kind[:, None] == kind[None], 0.0)


def _numbers(names: Sequence[str]) -> Tensor:
    number = {name: n for n, name in enumerate(dict.fromkeys(names))}
    return torch.tensor([number[name] for name in names], dtype=torch.long)


@register("measure", "zste")
def zste(
    stage: AlignStage,
    measure: MeasureConfig,
    records: list[dict[str, Any]],
    count: int = 200,
    names: int | Sequence[str] | None = None,
    gap: float = 0.1,
    forms: int = 2,
    seed: int = 0,
) -> list[Figure]:
    """Staged zero-shot tests of time (section 4), of pairs that are made from these single sounds.

    ``NAME_one``: the name of a sound, among all. ``NAME_both``: "a and b" against "a and c". ``NAME_order``: the right
    order of two sounds against the wrong one, said by "before" and by "after". ``NAME_overlay``: "before" against
    "while", for sounds of both sorts. The control reads the texts of other sounds.

    Args:
        count: pairs; ``names``, ``gap``, ``seed`` as in ``sound_pairs``.
        forms: 1 asks for the order by "before" alone.
    """
    from mmllm.evaluate.stats import derangement, mean_interval
    from mmllm.train.align_measures import stream_rows, text_embeddings

    recipe = SoundPairs(["single", "forward", "reversed", "overlay"], count, names, gap, seed)
    made = list(recipe.apply(iter(records)))
    rows, _ = stream_rows(stage, measure, measure.streams[0], made)
    known = sorted({r["meta"]["first"] for r in made} | {r["meta"]["second"] for r in made})

    def choices(record: dict[str, Any]) -> dict[str, list[list[str]]]:
        """Test -> tuples of texts of which the first is right."""
        kind, a, b = record["meta"]["kind"], record["meta"]["first"], record["meta"]["second"]
        if kind == "single":
            return {"one": [[a, *(n for n in known if n != a)]]}
        before, other = texts_of_pair("forward", a, b)[0], next(n for n in known if n not in (a, b))
        if kind == "overlay":
            return {"overlay": [[texts_of_pair("overlay", a, b)[0], before]]}
        wrong = "reversed" if kind == "forward" else "forward"
        found = {"order": [list(x) for x in zip(*(texts_of_pair(k, a, b)[:forms] for k in (kind, wrong)))]}
        if kind == "forward":
            found["overlay"] = [[before, texts_of_pair("overlay", a, b)[0]]]
            if len(known) > 2:
                found["both"] = [[texts_of_pair("both", a, x)[0] for x in (b, other)]]
        return found

    asked = [(k, test, texts) for k, r in enumerate(made) for test, sets in choices(r).items() for texts in sets]
    unique = sorted({t for _, _, texts in asked for t in texts})
    text = dict(zip(unique, text_embeddings(stage, measure.streams[1], [[t] for t in unique])))
    out = []
    for test in dict.fromkeys(t for _, t, _ in asked):
        mine = [(k, texts) for k, t, texts in asked if t == test]
        swapped = derangement(len(mine), stage.config.train.seed)

        def hits(which: Sequence[int], mine: Any = mine) -> list[float]:
            scores = [torch.stack([text[t] for t in mine[n][1]]) @ rows[mine[w][0]] for n, w in enumerate(which)]
            return [float(bool((s[0] > s[1:]).all())) for s in scores]

        clusters = [made[k]["group"] for k, _ in mine]
        value, low, high = mean_interval(hits(range(len(mine))), clusters)
        control, c_low, c_high = mean_interval(hits(swapped), clusters)
        bounds = (low, high, len(mine), "fraction", control, c_low, c_high, 1 / len(mine[0][1]))
        out.append(Figure(f"{measure.name}_{test}", value, "higher", *bounds))
    return out
