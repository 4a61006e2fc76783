"""DreamLIP: Language-Image Pre-training with Long Captions (arXiv 2403.17007).

slug: dreamlip
number: 23
shelf: 1
kind: objective
config: "objectives: [{type: dreamlip, options: {pair: [image, text]}}]  # with captions: all, a connector for image"
left_out: long captions written by a multimodal language model; the source's captions, or its boxes' names, serve.
differs: the released loss reads texts that lie slot by slot as if they lay item by item, so that a caption is grouped
  over another item's patches; each text has its own item here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmllm.blocks.contrast import softmax_contrast
from mmllm.blocks.items import item_rows
from mmllm.contracts import AlignBatch, Objective
from mmllm.errors import UserError
from mmllm.evaluate.ranking import rank_positives
from mmllm.evaluate.stats import mean_interval
from mmllm.registry import register
from mmllm.report.figures import Figure

WHERE = "objective 'dreamlip'"


@register("objective", "dreamlip")
class DreamLIP(Objective):
    """Several texts for each picture: every slot contrasted by itself, and each text with its own patches (section 3).

    The k-th texts of all items are contrasted with the pictures, each slot with its own matrix, so that an item's other
    texts are no negatives. Then each text is compared with the mean of its picture's patches, weighted by their
    similarity to it, against all other texts' patches: there the same picture's other texts are negatives.

    Args:
        pair: (pictures with a connector into the shared space, texts of which an item may have several).
        grouping: weight of the second loss.
        threshold: patches whose similarity, scaled to 0..1 over the picture's patches, is below it do not count; None:
            one divided by the number of patches.
        weights: ``minmax`` (the paper's) or ``softmax`` over the patches.
        softmax_temperature: of the latter.
    """

    def __init__(
        self,
        pair: Sequence[str],
        grouping: float = 1.0,
        threshold: float | None = None,
        weights: str = "minmax",
        softmax_temperature: float = 0.07,
    ):
        super().__init__()
        if len(pair) != 2:
            raise UserError(f"a pair has two streams (got {list(pair)})", WHERE)
        if weights not in ("minmax", "softmax"):
            raise UserError(f"weights must be minmax or softmax (got '{weights}')", WHERE)
        if threshold is not None and not 0 <= threshold <= 1:
            raise UserError(f"threshold must be within 0..1 (got {threshold})", WHERE)
        self.pair, self.grouping, self.threshold = (str(pair[0]), str(pair[1])), grouping, threshold
        self.weights, self.softmax_temperature = weights, softmax_temperature
        image, text = self.pair
        self.needs = frozenset({f"{image}.embedding", f"{text}.embedding"})
        if grouping:
            self.needs |= {f"{image}.token_embedding"}
            self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    @property
    def pair_name(self) -> str:
        return ":".join(self.pair)

    def forward(self, batch: AlignBatch) -> dict[str, Tensor]:
        image, text = (batch.streams[s] for s in self.pair)
        assert image.embedding is not None and text.embedding is not None
        size, device = len(batch), image.embedding.device
        everyone = torch.arange(size, device=device)
        has = everyone if image.owner is None else image.owner
        if len(torch.unique(has)) < len(has):
            raise UserError(f"'{self.pair[0]}' has several rows for an item", WHERE, "several texts, but one picture")
        row = torch.full((size,), -1, device=device)
        row[has] = torch.arange(len(has), device=device)
        owner = everyone if text.owner is None else text.owner
        kept = row[owner] >= 0
        texts, owner = text.embedding[kept], owner[kept]
        valid = torch.zeros(size, dtype=torch.bool, device=device)
        valid[owner] = True
        scale = batch.logit_scale[self.pair_name]
        if not len(owner):
            return {"loss": scale * everyone.float() * 0.0, "valid": valid}
        each = self.slots(image.embedding[row[owner]], texts, slot_of(owner), scale)
        out = {"slots": item_rows(each, owner, size)[0]}
        if self.grouping:
            tokens, mask = image.token_embedding, image.token_mask
            assert tokens is not None
            mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=device) if mask is None else mask
            groups = self.grouped(texts, tokens[row[owner]], mask[row[owner]])
            logits = self.logit_scale.exp().clamp(max=100.0) * texts @ groups.T
            out["groups"] = item_rows(0.5 * (softmax_contrast(logits) + softmax_contrast(logits.T)), owner, size)[0]
        loss = out["slots"] + (self.grouping * out["groups"] if self.grouping else 0.0)
        count = valid.sum().clamp(min=1)
        return {"loss": loss, "valid": valid, **{k: (v * valid).sum() / count for k, v in out.items()}}

    @staticmethod
    def slots(images: Tensor, texts: Tensor, slot: Tensor, scale: Tensor) -> Tensor:
        """InfoNCE of each text row [R, P] with its own picture's row, within the rows of its slot [R]; [R]."""
        other = slot[:, None] != slot[None]
        logits = (scale * images @ texts.T).masked_fill(other, -torch.inf)
        own = logits.diagonal()
        return 0.5 * ((logits.logsumexp(1) - own) + (logits.logsumexp(0) - own))

    def grouped(self, texts: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """Unit vectors [R, P]: for each text [R, P] the mean of its own patches [R, M, P] by ``patch_weights``."""
        return F.normalize((self.patch_weights(texts, tokens, mask)[..., None] * tokens).sum(1), dim=-1)

    def patch_weights(self, texts: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """[R, M]: how much each patch counts for a text, with sum 1 (equations 5 to 7)."""
        alike = (F.normalize(tokens, dim=-1) @ texts[..., None])[..., 0]
        if self.weights == "softmax":
            return (alike / self.softmax_temperature).masked_fill(~mask, -torch.inf).softmax(1)
        return thresholded(alike, mask, self.threshold)


def thresholded(alike: Tensor, mask: Tensor, threshold: float | None) -> Tensor:
    """Similarities [R, M] scaled to 0..1 over the valid patches, those below the threshold 0, divided by their sum."""
    low = alike.masked_fill(~mask, torch.inf).amin(1, keepdim=True)
    high = alike.masked_fill(~mask, -torch.inf).amax(1, keepdim=True)
    scaled = (alike - low) / (high - low + 1e-10)
    limit: Any = 1 / mask.sum(1, keepdim=True).clamp(min=1) if threshold is None else threshold
    # Where all patches are equally similar, none stands out and all count.
    flat = (high - low) <= 1e-10
    kept = torch.where(flat, mask.to(scaled), scaled.masked_fill(~mask | (scaled < limit), 0.0))
    return kept / kept.sum(1, keepdim=True).clamp(min=1e-10)


def slot_of(owner: Tensor) -> Tensor:
    """The how manyth row of its item each row is, [R], from 0."""
    same = owner[:, None] == owner[None]
    return same.tril(-1).sum(1)


@register("measure", "named_objects")
def named_objects(stage: Any, measure: Any, records: list[dict[str, Any]]) -> list[Figure]:
    """Scenes with boxes: ``NAME_map``, how high the names of a picture's boxes rank among all names, and
    ``NAME_located``, the share of boxes that hold the centre of the patch most similar to their name.

    Chance of the latter is the boxes' mean share of the picture's patches.
    """
    from mmllm.data.questions import with_article
    from mmllm.evaluate.ranking import chance_precision
    from mmllm.train.align_measures import plain_embeddings, text_embeddings

    records = [r for r in records if r.get("boxes")]
    if not records:
        return [Figure(f"{measure.name}_map", None, note="no records with boxes")]
    image, text = measure.streams[:2]
    names = sorted({with_article(b["text"]) for r in records for b in r["boxes"]})
    gallery = text_embeddings(stage, text, [[n] for n in names])
    held = [[with_article(b["text"]) for b in r["boxes"]] for r in records]
    positives = [sorted({names.index(n) for n in group}) for group in held]
    found = rank_positives(plain_embeddings(stage, measure, records, "embedding", image)[0], gallery, positives)
    value, low, high = mean_interval(found.precision.numpy(), None, 0)
    chance = chance_precision([len(p) for p in positives], len(names))
    out = [Figure(f"{measure.name}_map", value, "higher", low, high, len(records), "fraction", chance=chance)]
    if image not in stage.model.connectors:
        return out
    tokens, _, grid = plain_embeddings(stage, measure, records, "token_embedding", image)
    if grid is None or grid[1] * grid[2] != tokens.shape[1]:
        return out
    hits, shares, whose = [], [], []
    for i, (record, group) in enumerate(zip(records, held)):
        for box, name in zip(record["boxes"], group):
            inside = patches_in(box["xyxy"], grid[1], grid[2])
            best = int((F.normalize(tokens[i], dim=-1) @ gallery[names.index(name)]).argmax())
            hits.append(bool(inside[best]))
            shares.append(float(inside.double().mean()))
            whose.append(str(record["id"]))
    value, low, high = mean_interval(torch.tensor(hits).double().numpy(), whose, 0)
    title, chance = f"{measure.name}_located", sum(shares) / len(shares)
    return [*out, Figure(title, value, "higher", low, high, len(hits), "fraction", chance=chance)]


def patches_in(xyxy: Sequence[float], rows: int, columns: int) -> Tensor:
    """[rows * columns] bool: patches whose centre lies in a box, in 0..1."""
    x, y = (torch.arange(columns) + 0.5) / columns, (torch.arange(rows) + 0.5) / rows
    wide, high = (x >= xyxy[0]) & (x < xyxy[2]), (y >= xyxy[1]) & (y < xyxy[3])
    return (high[:, None] & wide[None]).flatten()
