"""Cross-Modal Implicit Relation Reasoning and Aligning for Text-to-Image Person Retrieval (arXiv 2303.12501).

slug: irra
number: 31
shelf: 1
kind: objective
config: "objectives: [{type: sdm, options: {pair: [image, text]}}, {type: irr, options: {pair: [image, text], layers: 1}}, {type: identity, options: {pair: [image, text], identities: 8}}]"
left_out: person pictures; things of several vendors, or words of several voices, share an identity here. New parts have
  five times the learning rate, as in the paper.
differs: the released code divides soft labels by a column of sums that is read as a row, which is right for labels of 0
  and 1 alone; the identity classifier sees unit vectors times a scale.
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmllm.align.objectives import PairObjective
from mmllm.align.record_keys import stable_id
from mmllm.blocks.cross_attention import CrossAttention
from mmllm.blocks.items import item_rows
from mmllm.blocks.tiled_contrast import contrast
from mmllm.blocks.transformer import Encoder
from mmllm.contracts import AlignBatch, Objective
from mmllm.data.input_transforms import IGNORED
from mmllm.errors import UserError
from mmllm.registry import register


@register("objective", "sdm")
class SDM(PairObjective):
    """Similarity distribution matching: KL(softmax of similarities || equal shares of one label), both ways (eq. 5).

    Args:
        same_label: items of one label belong together.
        temperature: fixed.
        partial: target, before division by their sum, of items that share the label alone; 1 makes no difference.
        floor: added to the shares.
    """

    def __init__(
        self,
        pair: Sequence[str],
        same_label: bool = True,
        temperature: float = 0.02,
        partial: float = 1.0,
        floor: float = 1e-8,
        scorer: str | dict[str, Any] = "cosine",
    ):
        super().__init__(pair, same_label, scorer)
        if temperature <= 0 or floor <= 0 or not 0 <= partial <= 1:
            what = "temperature and floor must be above 0, and partial within 0..1"
            raise UserError(f"{what} (got {temperature}, {floor}, {partial})", "objective 'sdm'")
        self.temperature, self.partial, self.floor = temperature, partial, floor

    def loss(self, rows: Any, cols: Any, batch: AlignBatch, **how: Any) -> Tensor:
        # The base takes the mean of both directions, the paper their sum. A learned temperature has no part in it.
        value = contrast(rows, cols, scale=1 / self.temperature, divergence="reverse_kl", floor=self.floor, **how)
        return 2 * value + 0.0 * batch.logit_scale[self.pair_name]

    def _targets(self, batch: AlignBatch, own: Tensor | None, theirs: Tensor | None) -> Any:
        alike = super()._targets(batch, own, theirs)
        if self.partial == 1:
            return alike

        def shares(i: slice, j: slice) -> Tensor | None:
            found = alike(i, j)
            if found is None:
                return None
            rows, cols = torch.arange(i.start, i.stop), torch.arange(j.start, j.stop)
            if own is not None and theirs is not None:
                rows, cols = own[i], theirs[j]
            same = rows[:, None].to(found.device) == cols[None].to(found.device)
            return found * torch.where(same, 1.0, self.partial)

        return shares


@register("objective", "irr")
class ImplicitRelations(Objective):
    """Masked words told from their sentence and the picture's tokens, through a block that training alone has (3.2).

    The masked text, read by the text's own tower, looks once at the picture's tokens (without a residual), and then at
    itself in ``layers`` transformer layers.

    Args:
        pair: (the stream looked at, the text stream).
        p: share of the tokens that are masked.
    """

    lr_multiplier = 5.0
    gathered = False

    def __init__(self, pair: Sequence[str], p: float = 0.15, layers: int = 4, heads: int = 8):
        super().__init__()
        if len(pair) != 2 or layers < 1:
            raise UserError("it takes a pair of streams and at least one layer", "objective 'irr'")
        self.image, text = (str(s) for s in pair)
        self.text, self.layers, self.heads = f"{text}@irr", layers, heads
        self.streams = {self.text: {"of": text, "input_transforms": [{"type": "mask_tokens", "p": p}]}}
        self.needs = frozenset({f"{self.image}.tokens", f"{self.text}.tokens", f"{self.text}.labels"})

    def setup(self, model: Any) -> None:
        tower, other = model.tower(self.text), model.tower(self.image)
        if tower.modality != "text":
            raise UserError(f"'{self.text}' is no text stream", "objective 'irr'", "name the text stream second")
        width = tower.hidden_size
        heads = next(h for h in range(min(self.heads, width), 0, -1) if width % h == 0)
        words = max(int(getattr(tower, "vocab_size", 0) or 0), len(tower.preprocessor()))
        self.query_norm, self.memory_norm = nn.LayerNorm(width), nn.LayerNorm(other.hidden_size)
        self.cross = CrossAttention(width, other.hidden_size, heads)
        self.encoder, self.norm = Encoder(width, heads, self.layers), nn.LayerNorm(width)
        self.head = nn.Sequential(nn.Linear(width, width), QuickGELU(), nn.LayerNorm(width), nn.Linear(width, words))

    def forward(self, batch: AlignBatch) -> dict[str, Tensor]:
        text, image = batch.streams[self.text], batch.streams[self.image]
        assert text.features is not None and image.features is not None
        labels, states, device = text.extras["labels"], text.features.tokens, text.features.tokens.device
        everyone = torch.arange(len(batch), device=device)
        row = torch.full((len(batch),), -1, device=device)
        has = everyone if image.owner is None else image.owner
        row[has] = torch.arange(len(has), device=device)
        looked_at = row[everyone if text.owner is None else text.owner]
        kept = looked_at >= 0
        asked = (labels.to(device) != IGNORED) & kept[:, None]
        if not bool(asked.any()):
            return {"loss": sum(p.sum() for p in self.parameters()) * 0.0 + states.sum() * 0.0}
        tokens, mask = image.features.tokens[looked_at[kept]], image.features.mask[looked_at[kept]]
        fused = self.fuse(states[kept], text.features.mask[kept], tokens, mask)
        logits, target = self.head(fused[asked[kept]]).float(), labels.to(device)[asked]
        accuracy = (logits.argmax(-1) == target).float().mean()
        return {"loss": F.cross_entropy(logits, target), "word_accuracy": accuracy}

    def fuse(self, states: Tensor, mask: Tensor, tokens: Tensor, token_mask: Tensor) -> Tensor:
        """Text [R, L, D] with the picture's tokens [R, M, E] -> [R, L, D]."""
        memory = self.memory_norm(tokens.to(self.memory_norm.weight.dtype))
        looked = self.cross(self.query_norm(states), memory, token_mask.bool())
        return self.norm(self.encoder(looked, mask.bool())[0])


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x)."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


@register("objective", "identity")
class Identity(Objective):
    """Each stream's embedding names its item's label among all of the training data, by one linear layer (3.3).

    An item's loss is the mean of those of the streams that it has.

    Args:
        identities: how many labels there are at most; numbers are given as they come.
        scale: factor on the unit embeddings.
    """

    lr_multiplier = 5.0
    known: Tensor

    def __init__(self, pair: Sequence[str], identities: int, scale: float = 16.0):
        super().__init__()
        if identities < 2:
            raise UserError(f"identities must be at least 2 (got {identities})", "objective 'identity'")
        self.pair, self.identities, self.scale = tuple(str(s) for s in pair), identities, scale
        self.needs = frozenset({f"{s}.embedding" for s in pair} | {"labels"})
        self.register_buffer("known", torch.full((identities,), -1, dtype=torch.long))

    def setup(self, model: Any) -> None:
        self.classifier = nn.Linear(model.embedding_dim, self.identities)
        nn.init.normal_(self.classifier.weight, std=0.001)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, batch: AlignBatch) -> dict[str, Tensor]:
        ids = batch.label_ids
        if ids is None:
            ids = torch.tensor([stable_id(label) for label in batch.labels or ()])
        target = self.numbers(ids.to(self.known.device))
        total, count = torch.zeros(len(batch), device=target.device), torch.zeros(len(batch), device=target.device)
        for name in self.pair:
            stream = batch.streams[name]
            assert stream.embedding is not None
            rows, there = item_rows(stream.embedding, stream.owner, len(batch))
            each = F.cross_entropy(self.classifier(self.scale * rows), target, reduction="none")
            total, count = total + each * there, count + there
        return {"loss": total / count.clamp(min=1), "valid": count > 0}

    @torch.no_grad()
    def numbers(self, ids: Tensor) -> Tensor:
        """Class numbers of label ids [B]; new ones get the next free numbers.

        Raises:
            UserError: there are more labels than ``identities``.
        """
        new = ids[~torch.isin(ids, self.known)].unique()
        held = int((self.known >= 0).sum())
        if held + len(new) > self.identities:
            do = "raise it to the number of labels in the data"
            raise UserError(f"there are more than identities = {self.identities} labels", "objective 'identity'", do)
        self.known[held : held + len(new)] = new
        return (ids[:, None] == self.known[None]).long().argmax(1)
