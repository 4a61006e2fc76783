"""GLSCL: Text-Video Retrieval with Global-Local Semantic Consistent Learning (arXiv 2405.12710).

slug: glscl
number: 81
shelf: 1
kind: objective
config: "objectives: [{type: glscl, options: {pair: [video, text]}}]  # and a connector for both streams"
left_out: MSR-VTT and the other video sets, and the clock time of retrieval.
differs: released code sums rho over the batch, does not renormalise the frame weights under the mask and does not mask
  padding in the decoder; here rho is a mean, and padding takes no part anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmllm.align.objectives import PairObjective
from mmllm.blocks.items import item_rows
from mmllm.blocks.pooling import masked_mean
from mmllm.blocks.tiled_contrast import contrast
from mmllm.contracts import AlignBatch, Scorer, Stream
from mmllm.errors import UserError
from mmllm.registry import register
from mmllm.report.figures import Figure

if TYPE_CHECKING:
    from mmllm.align.config import MeasureConfig
    from mmllm.train.align import AlignStage


def by_frame(tokens: Tensor, mask: Tensor, frames: int | None) -> tuple[Tensor, Tensor]:
    """Tokens that lie frame by frame as the mean of each frame: [B, F * N, P] -> [B, F, P] and mask [B, F].

    Raises:
        UserError: the number of tokens is no multiple of that of the frames.
    """
    if frames is None:
        return tokens, mask
    if tokens.shape[1] % frames:
        raise UserError(f"{tokens.shape[1]} tokens are no multiple of {frames} frames", "frames")
    mask = mask.unflatten(1, (frames, -1))
    return masked_mean(tokens.unflatten(1, (frames, -1)), mask), mask.any(-1)


def text_vector(tokens: Tensor, mask: Tensor, how: str) -> Tensor:
    """One vector of each text's tokens [A, W, P]: its ``first`` or their ``mean``; [A, P], of any length."""
    return tokens[:, 0] if how == "first" else masked_mean(tokens, mask)


def text_conditioned(texts: Tensor, frames: Tensor, mask: Tensor, temperature: float = 3.0) -> Tensor:
    """Cosine of each text with each video's frames averaged as the text weighs them; [A, B] (section III-B).

    Args:
        texts: [A, P]; frames: [B, F, P], both of their own length; mask: [B, F] bool.
        temperature: of the softmax over frames of <text, frame>; infinite: the mean of the frames.
    """
    logits = torch.einsum("ad,bfd->abf", texts, frames) / temperature
    weights = logits.masked_fill(~mask[None], torch.finfo(logits.dtype).min).softmax(-1) * mask[None]
    pooled = torch.einsum("abf,bfd->abd", weights, frames)
    return (F.normalize(texts, dim=-1)[:, None] * F.normalize(pooled, dim=-1)).sum(-1)


def diversity(queries: Tensor, margin: float = 0.1) -> Tensor:
    """Margin ranking on the batch's mean Gram matrix [Q, Q] of unit queries [B, Q, P]: other queries below the own."""
    gram = torch.einsum("bqd,brd->qr", queries, queries) / max(len(queries), 1)
    own = gram.diagonal()
    over = (gram - own[:, None] + margin).relu() + (gram - own[None] + margin).relu()
    off = ~torch.eye(len(gram), dtype=torch.bool, device=gram.device)
    return over[off].mean() if len(gram) > 1 else gram.sum() * 0.0


def consistency(videos: Tensor, texts: Tensor, bonus: float, aim: float = 0.75) -> Tensor:
    """Squared distance of the mean queries, plus ``bonus`` times that of each query's mean cosine from ``aim``.

    Args:
        videos, texts: unit queries of pairs, [B, Q, P].
    """
    rho = (videos * texts).sum(-1).mean(0)
    return F.mse_loss(videos.mean(0), texts.mean(0)) + bonus * (rho - aim).square().sum()


@register("objective", "glscl")
class GLSCL(PairObjective):
    """InfoNCE on text-conditioned pooling of frames and on concepts that both modalities read by the same queries.

    Retrieval needs the first part alone, which has no parameters (the measure ``glscl``).

    Args:
        pair: the video stream and the text stream, both with a connector.
        frames: frames of a video, where each has several tokens; None: each token is one.
        text_token: what stands for a text, its ``first`` token or the ``mean``.
        temperature: see ``text_conditioned``.
        queries, layers, heads: of the shared decoder.
        local: weight of the concepts' cosine in the score; 0 makes no decoder.
        consistency_weight, bonus, diversity_weight: of the two terms that hold queries of both modalities together
            (with the bonus for a cosine of 0.75) and those of a video apart.
    """

    def __init__(
        self,
        pair: Sequence[str],
        same_label: bool = True,
        frames: int | None = None,
        text_token: str = "first",
        temperature: float = 3.0,
        queries: int = 8,
        layers: int = 3,
        heads: int = 4,
        local: float = 0.5,
        consistency_weight: float = 1.0,
        bonus: float = 0.01,
        diversity_weight: float = 1e-4,
    ):
        super().__init__(pair, same_label)
        if text_token not in ("first", "mean") or temperature <= 0 or queries < 1:
            what = "text_token is 'first' or 'mean', temperature above 0 and queries at least 1"
            raise UserError(what, "objective 'glscl'")
        self.frames, self.text_token, self.temperature = frames, text_token, temperature
        self.local, self.consistency_weight = local, consistency_weight
        self.bonus, self.diversity_weight = bonus, diversity_weight
        self.shape = queries, layers, heads
        self.gathered = True  # texts are as long as the longest of each process
        self.needs = frozenset(f"{s}.token_embedding" for s in self.pair)
        self.decoder: nn.TransformerDecoder | None = None
        self._seen: dict[str, tuple[Tensor, Tensor | None]] = {}  # the concepts of the batch at hand

    def setup(self, model: Any) -> None:
        if not self.local:
            return
        (queries, layers, heads), width = self.shape, model.embedding_dim
        if width % heads:
            raise UserError(f"embedding_dim {width} is no multiple of {heads} heads", "objective 'glscl'")
        layer = nn.TransformerDecoderLayer(width, heads, 4 * width, 0.0, batch_first=True, norm_first=True)
        self.decoder = nn.TransformerDecoder(layer, layers, norm=nn.LayerNorm(width))
        self.queries = nn.Parameter(torch.randn(queries, width) * 0.02)

    def concepts(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """What the shared queries read from tokens [B, M, P], unit vectors [B, Q, P]; without a decoder [B, 0, P]."""
        if self.decoder is None:
            return tokens[:, :0]
        asked = self.queries.expand(len(tokens), -1, -1)
        hidden = ~mask & mask.any(-1, keepdim=True)
        return F.normalize(self.decoder(asked, tokens, memory_key_padding_mask=hidden).float(), dim=-1)

    def _rows(self, batch: AlignBatch, name: str) -> tuple[Any, Tensor | None]:
        """(frames, mask, concepts) of the video stream, (vector, concepts) of the text stream."""
        stream = batch.streams[name]
        tokens, mask = stream.token_embedding, stream.token_mask
        assert tokens is not None and mask is not None
        if name == self.pair[0]:
            tokens, mask = by_frame(tokens, mask.bool(), self.frames)
            rows: Any = (tokens, mask, self.concepts(tokens, mask))
        else:
            rows = (text_vector(tokens, mask, self.text_token), self.concepts(tokens, mask.bool()))
        self._seen[name] = rows[-1], stream.owner
        return rows, stream.owner

    def score(self, query: Any, gallery: Any) -> Tensor:
        """Global and local cosine of rows of either stream, as ``_rows`` gives them; [q, g]."""
        if len(query) == 3:
            return self.score(gallery, query).T
        (text, words), (frames, mask, seen) = query, gallery
        out = text_conditioned(text, frames, mask, self.temperature)
        if seen.shape[1]:
            out = out + self.local * (words.flatten(1) @ seen.flatten(1).T) / seen.shape[1]
        return out

    def loss(self, rows: Any, cols: Any, batch: AlignBatch, *, score_fn: Any = None, **how: Any) -> Tensor:
        return contrast(rows, cols, scale=batch.logit_scale[self.pair_name], score_fn=self.score, **how)

    def forward(self, batch: AlignBatch) -> dict[str, Tensor]:
        out = super().forward(batch)
        found = [item_rows(*self._seen.pop(name), len(batch)) for name in self.pair]
        if self.decoder is None:
            return out
        both = found[0][1] & found[1][1]
        if both.any():
            videos, texts = (x[both] for x, _ in found)
            terms = {"consistency": consistency(videos, texts, self.bonus), "diversity": diversity(videos)}
            more = self.consistency_weight * terms["consistency"] + self.diversity_weight * terms["diversity"]
            out |= {"loss": out["loss"] + more, **terms}
        return out


class _Tokens(Scorer):
    needs = frozenset({"token_embedding"})

    def rows(self, stream: Stream) -> tuple[Tensor, Tensor]:
        assert stream.token_embedding is not None and stream.token_mask is not None
        return stream.token_embedding, stream.token_mask


@register("measure", "glscl")
def glscl(
    stage: AlignStage,
    measure: MeasureConfig,
    records: list[dict[str, Any]],
    frames: int | None = None,
    text_token: str = "first",
    temperature: float = 3.0,
) -> list[Figure]:
    """Retrieval between videos and their first texts by ``text_conditioned`` alone; options as in the objective."""
    from mmllm.align.record_keys import texts_of
    from mmllm.evaluate.retrieval import retrieval_figures
    from mmllm.train.align_measures import token_rows

    texts = [texts_of(r)[0] for r in records]
    names = list(dict.fromkeys(texts))
    video, text = measure.streams
    patches, valid = token_rows(stage, measure, video, records, [], _Tokens())
    tokens, mask = by_frame(patches, valid, frames)
    words, word_mask = token_rows(stage, measure, text, [], names, _Tokens())
    sim = text_conditioned(text_vector(words, word_mask, text_token), tokens, mask.bool(), temperature)
    positive = torch.tensor([[n == t for t in texts] for n in names])
    return [
        *retrieval_figures(f"{measure.name}_text_to_video", sim, positive, clusters=names),
        *retrieval_figures(f"{measure.name}_video_to_text", sim.T, positive.T, clusters=texts),
    ]
