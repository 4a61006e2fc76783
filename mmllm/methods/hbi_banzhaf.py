"""Video-Text as Game Players: Hierarchical Banzhaf Interaction (arXiv 2303.14369).

slug: hbi-banzhaf
number: 47
shelf: 1
kind: objective
config: |
  streams:
    image: {connector: {type: weighted_tokens, tokens: 4}}
    text: {connector: {type: weighted_tokens, tokens: 4}}
  phases: {both: {objectives: [{type: hbi, options: {pair: [image, text]}}]}}
left_out: the network that estimates interactions of many tokens; they are enumerated for few tokens and drawn for more.
  The question answering head.
differs: "a released version overwrites the sampled values instead of adding them up, leaves one cell for a coalition of
  two, uses 0 for absent cells inside the maximum, and does not detach what the raw level teaches."
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmllm.align.objectives import InfoNCE
from mmllm.blocks.common_rows import common_rows
from mmllm.blocks.contrast import symmetric_infonce
from mmllm.connectors.base import FolderConnector
from mmllm.connectors.simple import AvgPoolConnector
from mmllm.contracts import AlignBatch, Features, Scorer, Stream
from mmllm.errors import UserError
from mmllm.registry import register

Side = tuple[Tensor, Tensor]  # unit tokens [N, M, P] and their weights [N, M], 0 for padding


@register("connector", "weighted_tokens")
class WeightedTokens(FolderConnector):
    """Averaged and projected tokens whose length is the exponential of a learned score (section 3.2, equation 3).

    Args:
        stride, tokens, hidden_dim: see ``avg_pool``; a stride of 1 keeps all tokens.
    """

    def __init__(
        self, in_dim: int, out_dim: int, stride: int = 1, tokens: int | None = None, hidden_dim: int | None = None
    ):
        super().__init__("weighted_tokens", in_dim, out_dim, stride=stride, tokens=tokens, hidden_dim=hidden_dim)
        self.inner = AvgPoolConnector(in_dim, out_dim, stride, tokens, hidden_dim)
        self.score = nn.Sequential(nn.Linear(out_dim, out_dim), nn.ReLU(), nn.Linear(out_dim, 1))

    def forward(self, features: Features, text: Features | None = None) -> tuple[Tensor, Tensor]:
        tokens, mask = self.inner(features)
        weight = self.score(tokens).clamp(-10, 10).exp() * mask[..., None]
        return F.normalize(tokens, dim=-1) * weight, mask

    def num_tokens(self, grid_or_length: Any) -> int:
        return self.inner.num_tokens(grid_or_length)


@register("scorer", "weighted_interaction")
class WeightedInteraction(Scorer):
    """Each token's best cosine, averaged by the tokens' lengths, half from either side (equation 2)."""

    needs = frozenset({"token_embedding"})

    def rows(self, stream: Stream) -> Side:
        """Unit tokens [N, M, P] and weights [N, M]."""
        assert stream.token_embedding is not None and stream.token_mask is not None
        x = stream.token_embedding
        return F.normalize(x, dim=-1), x.norm(dim=-1) * stream.token_mask

    def score(self, query: Side, gallery: Side) -> Tensor:
        (q, a), (g, b) = query, gallery
        return value(torch.einsum("qmd,gnd->qgmn", q, g), a[:, None], b[None])


def value(s: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Value of a coalition of tokens (equation 2); 0 where either side is empty.

    Args:
        s: cosines [..., T, V].
        a, b: weights [..., T] and [..., V], not yet divided by their sum; 0 for tokens outside.
    """
    low = torch.finfo(s.dtype).min
    total_a, total_b = a.sum(-1, keepdim=True), b.sum(-1, keepdim=True)
    rows = s.masked_fill(~(b > 0)[..., None, :], low).amax(-1).masked_fill(~((a > 0) & (total_b > 0)), 0.0)
    cols = s.masked_fill(~(a > 0)[..., None], low).amax(-2).masked_fill(~((b > 0) & (total_a > 0)), 0.0)
    share_a, share_b = a / total_a.clamp(min=1e-20), b / total_b.clamp(min=1e-20)
    return 0.5 * ((rows * share_a).sum(-1) + (cols * share_b).sum(-1))


def interaction(
    game: Callable[[Tensor, Tensor], Tensor],
    rows: int,
    cols: int,
    exact: int = 12,
    samples: int = 2048,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Banzhaf interaction of every row player with every column player, [..., T, V] (equation 5).

    ``2^-(n-2) sum_S v(S+ij) - v(S+i) - v(S+j) + v(S)`` is four times the mean over all coalitions of ``v`` times the
    signs (1 present, -1 absent) of i and j; players without influence leave it as it is. With every player interactions
    get smaller by half, and what is drawn is only exact to about 1 / sqrt(samples): it serves for few players more.

    Args:
        game: (row players present [K, T] bool, column players present [K, V] bool) -> values [..., K].
        exact: the largest number of players for which all coalitions are asked; beyond, ``samples`` are drawn.
    """
    n = rows + cols
    if n <= exact:
        inside = (torch.arange(2**n)[:, None] >> torch.arange(n)) % 2 == 1
    else:
        inside = torch.rand(samples, n, generator=generator) < 0.5
    v = game(inside[:, :rows], inside[:, rows:])
    sign = inside.to(v) * 2 - 1
    v = v - v.mean(-1, keepdim=True)  # changes nothing but the variance of what is drawn
    return 4 * torch.einsum("...k,kt,kv->...tv", v, sign[:, :rows], sign[:, rows:]) / len(sign)


@torch.no_grad()
def banzhaf(s: Tensor, a: Tensor, b: Tensor, **how: Any) -> Tensor:
    """Interactions [B, T, V] of the tokens of B pairs; cosines [B, T, V], weights [B, T] and [B, V]."""

    def game(rows: Tensor, cols: Tensor) -> Tensor:
        rows, cols = rows.to(s.device), cols.to(s.device)
        return torch.stack([value(one[None], x * rows, y * cols) for one, x, y in zip(s, a, b)])

    return interaction(game, s.shape[1], s.shape[2], **how)


class Merge(nn.Module):
    """Clusters an item's tokens by density peaks and joins each cluster to one token (section 3.4).

    Args:
        ratio: clusters for each valid token, at least one.
        neighbours: k of the density.
    """

    def __init__(self, width: int, ratio: float, neighbours: int = 3):
        super().__init__()
        self.ratio, self.neighbours = ratio, neighbours
        self.norm, self.norm_all = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, side: Side) -> Side:
        """[N, M, P] and [N, M] -> [N, C, P] and [N, C]; a cluster weighs as much as its tokens do together."""
        x, weight = side
        member = self.clusters(x.detach(), weight > 0).to(x.dtype)  # [N, C, M]
        share = member * weight[:, None]
        total = share.sum(-1)
        merged = share @ x / total.clamp(min=1e-20)[..., None]
        logits = self.query(self.norm(merged)) @ self.key(self.norm_all(x)).transpose(1, 2) / x.shape[-1] ** 0.5
        logits = (logits + weight.clamp(min=1e-20).log()[:, None]).masked_fill(
            ~(weight > 0)[:, None], torch.finfo(x.dtype).min
        )
        merged = merged + self.out(logits.softmax(-1) @ self.value(self.norm_all(x)))
        return F.normalize(merged, dim=-1), total

    def clusters(self, x: Tensor, valid: Tensor) -> Tensor:
        """Which token belongs to which cluster, [N, C, M] bool; tokens [N, M, P], valid [N, M]."""
        far = 1e6
        apart = torch.cdist(x, x).masked_fill(~(valid[:, :, None] & valid[:, None]), far)
        k = min(self.neighbours, x.shape[1])
        near = apart.topk(k, -1, largest=False).values
        used = near < far
        density = (-(near.square() * used).sum(-1) / used.sum(-1).clamp(min=1)).exp()
        density = density - 1e-6 * torch.arange(x.shape[1], device=x.device)  # of equals the first is denser
        density = density.masked_fill(~valid, -1.0)
        higher = density[:, None] > density[:, :, None]
        gap = apart.masked_fill(~higher, far).amin(-1)
        gap = torch.where(gap < far, gap, apart.masked_fill(apart >= far, 0).amax((1, 2))[:, None])
        count = (valid.sum(1) * self.ratio).ceil().clamp(min=1).long()
        peak = ((density + 1) * gap.clamp(min=1e-9)).masked_fill(~valid, -1.0)
        centre = torch.argsort(peak, dim=-1, descending=True, stable=True)[:, : int(count.max())]
        real = torch.arange(centre.shape[1], device=x.device) < count[:, None]
        reach = apart.gather(1, centre[..., None].expand(-1, -1, x.shape[1])).masked_fill(~real[..., None], 2 * far)
        nearest = reach.argmin(1)
        return (nearest[:, None] == torch.arange(centre.shape[1], device=x.device)[:, None]) & valid[:, None]


class Header(nn.Module):
    """Predicts the interactions of a pair from the map of its cosines: convolution, attention of cells, convolution."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.into, self.out = nn.Conv2d(1, width, 3, padding=1), nn.Conv2d(width, 1, 3, padding=1)
        self.attention = nn.MultiheadAttention(width, 1, batch_first=True)

    def forward(self, s: Tensor) -> Tensor:
        """[B, T, V] -> [B, T, V]."""
        x = F.relu(self.into(s[:, None]))
        cells = x.flatten(2).transpose(1, 2)
        mixed = self.attention(cells, cells, cells, need_weights=False)[0]
        return self.out((cells + mixed).transpose(1, 2).reshape(x.shape))[:, 0]


@register("objective", "hbi")
class HBI(InfoNCE):
    """InfoNCE on the weighted interaction of tokens, at several levels of merged tokens, with a map of each pair's
    tokens that follows their Banzhaf interactions (section 3).

    Args:
        ratios: clusters for each token of the levels above the tokens themselves; empty: that level alone.
        interaction: weight of the KL from the interactions to the predicted map, both ways.
        distill: weight of the KL from the lowest level's similarities, as they are, to those of the others.
        sharpness: factor on the interactions inside their softmax.
        exact, samples: see ``interaction``.
    """

    def __init__(
        self,
        pair: Sequence[str],
        same_label: bool = True,
        ratios: Sequence[float] = (0.25, 0.5),
        interaction: float = 1.0,
        distill: float = 0.2,
        sharpness: float = 1000.0,
        exact: int = 12,
        samples: int = 2048,
    ):
        super().__init__(pair, same_label, scorer="weighted_interaction")
        if any(not 0 < r <= 1 for r in ratios):
            raise UserError(f"ratios must be above 0 and at most 1 (got {list(ratios)})", "objective 'hbi'")
        self.ratios, self.interaction, self.distill = list(ratios), interaction, distill
        self.sharpness, self.how = sharpness, {"exact": exact, "samples": samples}
        self.headers = nn.ModuleList(Header() for _ in range(len(self.ratios) + 1 if interaction else 0))
        self.merges = nn.ModuleList()

    def setup(self, model: Any) -> None:
        width = int(model.embedding_dim)
        self.merges.extend(nn.ModuleList(Merge(width, r) for _ in self.pair) for r in self.ratios)

    def forward(self, batch: AlignBatch) -> dict[str, Tensor]:
        out = super().forward(batch)
        rows, items = common_rows(batch, self.pair)
        if not len(items):
            return out
        x, y = (tuple(t.float()[rows[s]] for t in self.scorer.rows(batch.streams[s])) for s in self.pair)
        same = torch.eye(len(items), dtype=torch.bool, device=items.device)
        if self.same_label and batch.label_ids is not None:
            names = batch.label_ids.to(items.device)[items]
            same = names[:, None] == names[None]
        with torch.autocast(x[0].device.type, enabled=False):  # interactions are small differences of large sums
            more, maps = self.levels(batch, x, y, same)
        loss = out["loss"].index_add(0, items, more)
        return {**out, "loss": loss, **({"banzhaf_kl": maps} if self.interaction else {})}

    def levels(self, batch: AlignBatch, x: Side, y: Side, same: Tensor) -> tuple[Tensor, Tensor]:
        """What the levels add to each pair's loss, [B], and the mean of their interaction terms."""
        lowest = self.scorer.score(x, y).detach()
        more, maps = x[0].new_zeros(len(same)), x[0].new_zeros(())
        for level in range(len(self.ratios) + 1):
            if level:
                x, y = (merge(side) for merge, side in zip(self.merges[level - 1], (x, y)))  # type: ignore[arg-type]
                score = self.scorer.score(x, y)
                more = more + symmetric_infonce(score * batch.logit_scale[self.pair_name], same)
                more = more + self.distill * (follow(score, lowest) + follow(score.T, lowest.T))
            if self.interaction:
                loss = self.follow_interaction(self.headers[level], x, y, batch.step)
                more, maps = more + self.interaction * loss, maps + loss.detach().mean()
        return more, maps

    def follow_interaction(self, header: nn.Module, x: Side, y: Side, step: int) -> Tensor:
        """KL from softmax(interactions) to softmax(predicted map), over either side's tokens, [B]."""
        (u, a), (w, b) = x, y
        s = u @ w.transpose(1, 2)
        generator = torch.Generator().manual_seed(step)
        target = self.sharpness * banzhaf(s.detach(), a.detach(), b.detach(), generator=generator, **self.how)
        seen = (a > 0)[:, :, None] & (b > 0)[:, None]
        predicted = header(s * seen)
        low = torch.finfo(s.dtype).min
        predicted, target = (z.masked_fill(~seen, low) for z in (predicted, target))
        forth = (follow(predicted, target) * (a > 0)).sum(1) / (a > 0).sum(1).clamp(min=1)
        back = (follow(predicted.mT, target.mT) * (b > 0)).sum(1) / (b > 0).sum(1).clamp(min=1)
        return forth + back


def follow(logits: Tensor, target: Tensor) -> Tensor:
    """KL(softmax(target) || softmax(logits)) of each row, [..., R]."""
    q = target.log_softmax(-1)
    return (q.exp() * (q - logits.log_softmax(-1))).sum(-1)
