"""Learning Transferable Spatiotemporal Representations from Natural Script Knowledge (arXiv 2209.15280).

slug: tvts-transcript-sorting
number: 53
shelf: 1
kind: objective
config: |
  streams: {video: {connector: {type: sequence, frames: 4}}}
  phases:
    both:
      sources: {sequences: {recipes: [{type: sequence, length: 4}], captions: all, frames: 4}}
      objectives: [{type: tvts, options: {pair: [video, text], texts: 4}}]
left_out: "the mask over tubes of the video's tokens, which saves time, and speech recognition: texts come in the order
  of the record. Texts are not shuffled first, since the sorter gives each text its place whatever their order."
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmllm.align.objectives import InfoNCE
from mmllm.blocks.pooling import masked_mean
from mmllm.blocks.transformer import Encoder
from mmllm.contracts import AlignBatch, Stream
from mmllm.errors import UserError
from mmllm.registry import register

if TYPE_CHECKING:
    from mmllm.align.config import MeasureConfig
    from mmllm.report.figures import Figure
    from mmllm.train.align import AlignStage


class Sorter(nn.Module):
    """Gives each text of a set its place, from the tokens of the sequence that they belong to (section 3.3).

    Args:
        tokens, texts: widths of what it reads; ``places``: how many there are.
    """

    def __init__(self, tokens: int, texts: int, places: int, width: int = 128, layers: int = 2, heads: int = 4):
        super().__init__()
        self.from_tokens, self.from_texts = nn.Linear(tokens, width), nn.Linear(texts, width)
        self.kinds = nn.Parameter(torch.randn(2, width) * 0.02)
        self.encoder, self.norm = Encoder(width, heads, layers), nn.LayerNorm(width)
        self.classifier = nn.Linear(width, places)

    def forward(self, tokens: Tensor, mask: Tensor, texts: Tensor, there: Tensor) -> Tensor:
        """tokens [B, N, D], mask [B, N]; texts [B, K, E], which there are [B, K] -> logits of places [B, K, places]."""
        a, b = self.from_tokens(tokens) + self.kinds[0], self.from_texts(texts) + self.kinds[1]
        x, _ = self.encoder(torch.cat([a, b], 1), torch.cat([mask, there], 1))
        return self.classifier(self.norm(x[:, tokens.shape[1] :]))


@register("objective", "tvts")
class TVTS(InfoNCE):
    """InfoNCE of a sequence with the mean of its texts, and a cross-entropy of the place of each text.

    The sequence's embedding is the mean of its ``token_embedding``. The sorter reads the texts as the tower gives them
    and without gradient, so that the order has to come from the sequence.

    Args:
        pair: the stream of sequences, with a connector that knows order, and that of texts with ``captions: all``.
        texts: the largest number of texts of an item; those beyond take no part. Items with one text are not sorted.
        sort: weight of the sorting term; 0 is the plain contrast.
    """

    def __init__(self, pair: Sequence[str], same_label: bool = True, texts: int = 4, sort: float = 2.0):
        super().__init__(pair, same_label)
        if texts < 2:
            raise UserError(f"texts must be at least 2 (got {texts})", "objective 'tvts'")
        self.texts, self.sort = texts, sort
        video, text = self.pair
        self.needs = frozenset({f"{video}.token_embedding", f"{text}.embedding", f"{text}.pooled"})
        self.gathered = True
        self.sorter: Sorter | None = None

    def setup(self, model: Any) -> None:
        if self.sort:
            connector = model.connectors[model.owner(self.pair[0], "connector")]
            self.sorter = Sorter(int(connector.out_dim), model.tower(self.pair[1]).pooled_size, self.texts)

    def _rows(self, batch: AlignBatch, name: str) -> tuple[Any, Tensor | None]:
        stream = batch.streams[name]
        if name == self.pair[0]:
            assert stream.token_embedding is not None and stream.token_mask is not None
            return F.normalize(masked_mean(stream.token_embedding, stream.token_mask), dim=-1), stream.owner
        assert stream.embedding is not None
        if stream.owner is None:
            return stream.embedding, None
        held = stream.owner.unique()
        total = stream.embedding.new_zeros(len(batch), stream.embedding.shape[1])
        mean = F.normalize(total.index_add(0, stream.owner.to(total.device), stream.embedding), dim=-1)
        return (mean, None) if len(held) == len(batch) else (mean[held], held)

    def forward(self, batch: AlignBatch) -> dict[str, Tensor]:
        out = super().forward(batch)
        if self.sorter is None:
            return out
        video, text = (batch.streams[s] for s in self.pair)
        texts, there = by_item(text, len(batch), self.texts)
        owner = torch.arange(len(batch), device=texts.device) if video.owner is None else video.owner
        there = there[owner] & (there[owner].sum(1, keepdim=True) > 1)
        assert video.token_embedding is not None and video.token_mask is not None
        logits = self.sorter(video.token_embedding, video.token_mask, texts[owner], there)
        place = torch.arange(self.texts, device=texts.device).expand(there.shape)
        each = F.cross_entropy(logits.transpose(1, 2), place, reduction="none") * there
        count = there.sum(1)
        sorting = each.sum(1) / count.clamp(min=1)
        hits = ((logits.argmax(-1) == place) & there).sum() / count.sum().clamp(min=1)
        loss = out["loss"].index_add(0, owner, self.sort * sorting)
        return {**out, "loss": loss, "sort": each.sum() / count.sum().clamp(min=1), "sorted": hits.float()}


def by_item(stream: Stream, size: int, most: int) -> tuple[Tensor, Tensor]:
    """A text stream's pooled features as [size, most, D], in their order and without gradient, and which there are."""
    assert stream.features is not None
    pooled = stream.features.pooled.detach()
    owner = torch.arange(size) if stream.owner is None else stream.owner.cpu()
    order = owner.argsort(stable=True)
    start = torch.bincount(owner, minlength=size).cumsum(0) - torch.bincount(owner, minlength=size)
    place = torch.empty_like(owner)
    place[order] = torch.arange(len(owner)) - start[owner[order]]
    keep = place < most
    texts = pooled.new_zeros(size, most, pooled.shape[1])
    there = torch.zeros(size, most, dtype=torch.bool)
    there[owner[keep], place[keep]] = True
    texts[owner[keep].to(pooled.device), place[keep].to(pooled.device)] = pooled[keep.to(pooled.device)]
    return texts, there.to(pooled.device)


@register("measure", "what_came_first")
def what_came_first(
    stage: AlignStage, measure: MeasureConfig, records: list[dict[str, Any]], place: int = 0
) -> list[Figure]:
    """A linear probe on the mean token of frozen sequences for the ``field`` of the thing at a place.

    Records are made by the data recipe ``sequence``; a representation without order only knows what came at all.
    """
    from mmllm.evaluate.probes import probe_figures
    from mmllm.train.align_measures import plain_embeddings

    if measure.train is None:
        raise UserError(f"measure '{measure.name}' needs 'train'", do="name the records that the probe is fitted to")
    sides = []
    for part in (stage.records(measure.train, measure.recipes), records):
        tokens, mask, _ = plain_embeddings(stage, measure, part, "token_embedding")
        assert mask is not None
        sides.append((masked_mean(tokens, mask), [str(r["meta"][measure.field][place]) for r in part]))
    return probe_figures(measure.name, sides[0], sides[1])
