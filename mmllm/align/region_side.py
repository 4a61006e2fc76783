"""Objective that writes into each thing's grid cells on which side it lies, in the LLM's own words for it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmllm.align.model import pooled_texts
from mmllm.align.region_box import token_boxes
from mmllm.contracts import AlignBatch, Objective
from mmllm.registry import register

AXES = (("left", "right"), ("top", "bottom"))


@register("objective", "region_side")
class RegionSide(Objective):
    """Moves each token that lies on a thing along the lines from "left" to "right" and from "top" to "bottom".

    What a token says about its thing's name stays (the lines are two directions of many); where the thing lies becomes
    a word that the LLM can copy into an answer. Needs a connector with positions.

    Args:
        stream: whose ``token_embedding`` is aligned.
        dim: width of the word embeddings.
        words: the stream of the LLM's word embeddings.
        reach: how far a token goes along a line, in lengths of a word embedding around their mean.
        soft: distance of the thing's centre from the picture's middle, as a share of the side, at which it has gone all
            the way; nearer to the middle it goes in proportion.
    """

    axes: Tensor

    def __init__(self, stream: str, dim: int, words: str, reach: float = 0.5, soft: float = 0.2):
        super().__init__()
        self.stream, self.words, self.reach, self.soft = stream, words, reach, soft
        self.needs = frozenset({f"{stream}.token_embedding", "vocabulary"})
        self.register_buffer("axes", torch.zeros(len(AXES), dim))

    def setup(self, model: nn.Module) -> None:
        names = [word for axis in AXES for word in axis]
        low, high = pooled_texts(model.tower(self.words), names).view(len(AXES), 2, -1).unbind(1)  # type: ignore[operator]
        self.axes.copy_(F.normalize(high - low, dim=-1))

    def along(self, tokens: Tensor, words: Tensor) -> Tensor:
        """tokens [B, M, D], words [V, D] -> [B, M, 2]: how far each token lies to the right, and to the bottom."""
        centre = words.mean(0)
        length = (words - centre).norm(dim=-1).mean()
        return (tokens - centre) / length @ self.axes.to(tokens).T

    def forward(self, batch: AlignBatch) -> dict[str, Tensor]:
        tokens = batch.streams[self.stream].token_embedding
        assert tokens is not None
        owner, boxes = token_boxes(batch, self.stream)
        on_thing = owner >= 0
        if not on_thing.any():
            return {"loss": tokens.sum() * 0.0}
        found = self.along(tokens, batch.extras["vocabulary"]["embedding"].to(tokens))[on_thing].float()
        truth = boxes[owner[on_thing]]
        middle = (truth[:, :2] + truth[:, 2:]) / 2
        wanted = ((middle - 0.5) / self.soft).clamp(-1, 1)
        hit = ((found > 0) == (wanted > 0)).float().mean()
        return {"loss": F.mse_loss(found, self.reach * wanted), "side_accuracy": hit.detach()}
