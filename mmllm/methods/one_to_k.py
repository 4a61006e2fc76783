"""Improving the Consistency in Cross-Lingual Cross-Modal Retrieval with 1-to-K Contrastive Learning (arXiv 2406.18254).

slug: one-to-k
number: 9
shelf: 1
kind: objective
config: |
  objectives: [{type: one_to_k, options: {pair: [image, text]}}]
  # and the source has captions: all, the records a text in each language
left_out: the companions (matching with the worst aligned language as positive, masked words), which need a fusion
  encoder, and the pre-training on six languages.
differs: the released code divides both directions by K after averaging, which also makes text to image K times smaller;
  divided true does so. Its script reports the mean standard deviation of the ranks; mean_rank_variance gives both.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from mmllm.align.config import MeasureConfig
from mmllm.align.objectives import InfoNCE
from mmllm.blocks.tiled_contrast import contrast
from mmllm.contracts import AlignBatch
from mmllm.data.captions import captions_of
from mmllm.registry import register
from mmllm.report.figures import Figure


@register("objective", "one_to_k")
class OneToK(InfoNCE):
    """Contrast of an item with its texts in all languages at once (equation 1): all K of them are positives of one
    softmax, and each text has its item among the batch's. With one text it is InfoNCE.

    Args:
        pair: the items' stream and the texts'; items may have different numbers of texts.
        divided: both directions divided by the number of texts per item, as the released code has it.
        same_label: see PairObjective.
    """

    def __init__(
        self, pair: Sequence[str], divided: bool = False, same_label: bool = True, label_smoothing: float = 0.0
    ):
        super().__init__(pair, same_label, label_smoothing)
        self.divided = divided

    def loss(self, rows: Any, cols: Any, batch: AlignBatch, **how: Any) -> Tensor:
        scale = batch.logit_scale[self.pair_name]
        each = contrast(rows, cols, scale=scale, label_smoothing=self.label_smoothing, **how)
        counts = len(rows), len(cols)
        return each * min(counts) / max(counts) if self.divided else each


@register("measure", "mean_rank_variance")
def mean_rank_variance(stage: Any, measure: MeasureConfig, records: list[dict[str, Any]]) -> list[Figure]:
    """How differently an item ranks from language to language: mean over the items of the variance of its rank (section
    3.4), and of the standard deviation. Streams: items, texts.

    A text of each language asks for its item, and an item asks for its name among the names in one language. Items of
    one label belong together.
    """
    from mmllm.train.align_measures import plain_embeddings, text_embeddings

    said = [dict(reversed([(str(la), t) for la, t in captions_of(r)])) for r in records]
    languages = sorted({la for s in said for la in s})
    kept = [i for i, s in enumerate(said) if len(s) == len(languages)]
    if len(languages) < 2 or len(kept) < 2:
        return [Figure(measure.name, None, "lower", note="no records with texts in several languages")]
    records, said = [records[i] for i in kept], [said[i] for i in kept]
    labels = [str(r.get("label") or r["id"]) for r in records]
    items = plain_embeddings(stage, measure, records, "embedding")[0]
    found: dict[str, list[Tensor]] = {"to_text": [], "to_item": []}
    hits = []
    for language in languages:
        texts = text_embeddings(stage, measure.streams[1], [[s[language]] for s in said])
        scores = items @ texts.T
        for name, sim in (("to_text", scores), ("to_item", scores.T)):
            found[name].append(ranks_of(sim, labels))
        hits += [(r[-1] == 0).float().mean() for r in found.values()]
    out = [Figure(f"{measure.name}_r1", float(torch.stack(hits).mean()), "higher", n=len(records), unit="fraction")]
    for name, ranks in found.items():
        variance, deviation = rank_variance(torch.stack(ranks, 1))
        out.append(Figure(f"{measure.name}_{name}_variance", variance, "lower", n=len(records), unit="ranks squared"))
        out.append(Figure(f"{measure.name}_{name}_deviation", deviation, "lower", n=len(records), unit="ranks"))
    both = [f.value for f in out if f.name.endswith("_variance")]
    mean = sum(v for v in both if v is not None) / 2
    return [*out, Figure(f"{measure.name}_variance", mean, "lower", n=len(records), unit="ranks squared")]


def rank_variance(ranks: Tensor) -> tuple[float, float]:
    """Mean over items of the variance over K languages (divided by K), and of its root, for [N, K] ranks."""
    variance = ranks.double().var(1, unbiased=False)
    return float(variance.mean()), float(variance.sqrt().mean())


def ranks_of(sim: Tensor, labels: Sequence[Hashable]) -> Tensor:
    """[N]: the columns of other labels that score at least as high as the best of the row's own label (0 = first)."""
    number = {label: i for i, label in enumerate(dict.fromkeys(labels))}
    key = torch.tensor([number[label] for label in labels])
    own = key[:, None] == key[None]
    best = sim.masked_fill(~own, -torch.inf).amax(1, keepdim=True)
    return ((sim >= best) & ~own).sum(1)
