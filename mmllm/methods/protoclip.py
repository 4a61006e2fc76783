"""ProtoCLIP: Prototypical Contrastive Language Image Pretraining (arXiv 2206.10996).

slug: protoclip
number: 22
shelf: 1
kind: objective
config: "objectives: [{type: infonce, options: {pair: [image, text]}}, {type: protoclip, options: {pair: [image, text], prototypes: 4}}]"
left_out: the last phase with a frozen picture tower; an episode is one pass over the source (or ``every`` of them).
differs: the released code has hard targets by default, here a temperature makes them soft.
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmllm.blocks.items import item_rows
from mmllm.blocks.kmeans import cluster_means, kmeans
from mmllm.contracts import AlignBatch, Objective
from mmllm.errors import UserError
from mmllm.registry import register

WHERE = "objective 'protoclip'"
NONE = -1


class PrototypeHead(nn.Sequential):
    """Two linear layers, unit output (section 3.1)."""

    def __init__(self, dim: int, hidden: int, out: int):
        super().__init__(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, out))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(super().forward(x), dim=-1)


@register("objective", "protoclip")
class ProtoCLIP(Objective):
    """Classifies each item of a stream among prototypes by the cluster of its partner (sections 3.2 to 3.4).

    At the start of each episode the features of all training items are clustered in either stream. With back
    translation the prototypes of a stream are the means of its own features over the partner's clusters, so that it
    does not matter how far the streams lie apart. To be added to InfoNCE; it looks at one source.

    Args:
        prototypes: clusters of either stream; the paper has one for every 10 items.
        temperature: of the soft targets, the similarities between the partner's prototypes; 0: hard targets.
        back_translation: False compares with the partner's centroids themselves.
        teacher: a stream (texts of a language model) whose pooled features are clustered, too, with hard targets.
        teacher_weight: of its two losses.
        warmup: episodes without prototypes at the beginning.
        every: passes over the data for an episode.
        hidden, out_dim: widths of the two heads.
        seed: of the clustering.
    """

    episodes: Tensor
    cluster: Tensor
    centroids: Tensor
    translated: Tensor

    def __init__(
        self,
        pair: Sequence[str],
        prototypes: int = 64,
        temperature: float = 0.1,
        back_translation: bool = True,
        teacher: str | None = None,
        teacher_weight: float = 1.0,
        warmup: int = 0,
        every: int = 1,
        hidden: int = 2048,
        out_dim: int = 128,
        seed: int = 0,
    ):
        super().__init__()
        if len(pair) != 2:
            raise UserError(f"a pair has two streams (got {list(pair)})", WHERE)
        if prototypes < 2:
            raise UserError(f"prototypes must be at least 2 (got {prototypes})", WHERE)
        if temperature < 0 or every < 1 or warmup < 0:
            raise UserError("temperature and warmup must be at least 0, and every at least 1", WHERE)
        self.pair, self.count, self.temperature = (str(pair[0]), str(pair[1])), prototypes, temperature
        self.back_translation, self.teacher, self.teacher_weight = back_translation, teacher, teacher_weight
        self.warmup, self.every, self.hidden, self.out_dim, self.seed = warmup, every, hidden, out_dim, seed
        self.needs = frozenset({f"{s}.embedding" for s in pair} | ({f"{teacher}.pooled"} if teacher else set()))
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())
        self.register_buffer("episodes", torch.zeros((), dtype=torch.long))  # epochs seen, and how far they led

    def setup(self, model: Any) -> None:
        self.heads = nn.ModuleList([PrototypeHead(model.embedding_dim, self.hidden, self.out_dim) for _ in self.pair])

    def prepare(self, bank: Any) -> None:
        size = len(bank.source.records)
        names = 3 if self.teacher else 2  # clusters by the first stream, by the second, by the teacher
        self.register_buffer("cluster", torch.full((names, size), NONE, dtype=torch.long))
        self.register_buffer("centroids", torch.zeros(2, self.count, self.out_dim))
        # translated[s, c]: means of stream s over the clusters c, where c counts as in ``cluster``.
        self.register_buffer("translated", torch.zeros(2, names, self.count, self.out_dim))

    @torch.no_grad()
    def on_epoch(self, bank: Any) -> None:
        episode, begins = divmod(int(self.episodes), self.every)
        self.episodes += 1
        if begins != 0 or episode < self.warmup:
            return
        size = len(bank.source.records)
        features = []
        for head, stream in zip(self.heads, self.pair):
            rows, items = bank.embedding(stream)
            features.append(item_rows(head(rows.float()), items.to(rows.device), size))
        if self.teacher:
            rows, items = bank.pooled(self.teacher)
            features.append(item_rows(rows.float(), items.to(rows.device), size))
        self.form(features, int(self.episodes))

    @torch.no_grad()
    def form(self, features: Sequence[tuple[Tensor, Tensor]], episode: int = 0) -> None:
        """Clusters and prototypes from rows [N, out_dim] of either stream (and the teacher's), [N] bool: who has them.

        Raises:
            UserError: fewer items than prototypes.
        """
        for c, (rows, there) in enumerate(features):
            if int(there.sum()) < self.count:
                what = f"{int(there.sum())} items cannot be put into {self.count} clusters"
                raise UserError(what, WHERE, "lower prototypes or give more data")
            centroids, cluster = kmeans(rows[there], self.count, self.seed + 1000 * episode + c)
            self.cluster[c] = NONE
            self.cluster[c, there.to(self.cluster.device)] = cluster.to(self.cluster)
            if c < 2:
                self.centroids[c] = centroids
        for s, (rows, there) in enumerate(features[:2]):
            for c in range(len(features)):
                known = self.cluster[c].masked_fill(~there.to(self.cluster.device), NONE)
                self.translated[s, c] = cluster_means(rows, known, self.count)

    def forward(self, batch: AlignBatch) -> dict[str, Tensor]:
        assert batch.items is not None
        number = self.cluster[:, batch.items.to(self.cluster.device)]
        size = len(batch)
        loss, told = self.logit_scale * torch.zeros(size, device=number.device), torch.zeros(2, size)
        for s, name in enumerate(self.pair):
            stream = batch.streams[name]
            assert stream.embedding is not None
            rows, there = item_rows(self.heads[s](stream.embedding), stream.owner, size)
            for c, weight in ((1 - s, 1.0), (2, self.teacher_weight)):
                if c >= len(number):
                    continue
                # An item without a partner at the time of clustering has no class; nor has one that comes without s.
                known = there & (number[c] >= 0)
                each = self.classified(rows, number[c].clamp(min=0), s, c)
                loss = loss + 0.5 * weight * torch.where(known, each, 0.0)
                told[s] = torch.maximum(told[s], known.cpu().float())
        valid = told.amax(0).bool().to(loss.device)
        return {"loss": loss, "valid": valid, "prototype_scale": self.scale.detach()}

    @property
    def scale(self) -> Tensor:
        return self.logit_scale.exp().clamp(max=100.0)

    def classified(self, rows: Tensor, number: Tensor, s: int, c: int) -> Tensor:
        """Cross-entropy of stream s's rows [B, out_dim] among the clusters c, of which ``number`` [B] is right; [B]."""
        prototypes = self.translated[s, c] if self.back_translation or c == 2 else self.centroids[c]
        logits = self.scale * rows @ prototypes.T
        if self.temperature == 0 or c == 2:
            return F.cross_entropy(logits, number, reduction="none")
        target = (self.centroids[c][number] @ self.centroids[c].T / self.temperature).softmax(1)
        return -(target * logits.log_softmax(1)).sum(1)
