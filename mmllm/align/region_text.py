"""Objective that has tokens on no grid spell each thing out, as text would: its name, its side, its box."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmllm.align.matching import assigned_things
from mmllm.align.model import pooled_texts
from mmllm.align.objectives import RegionAlign
from mmllm.blocks.box_code import box_axes, waves
from mmllm.contracts import AlignBatch
from mmllm.errors import UserError, unknown
from mmllm.registry import register

TOKENS = {"name": 1, "side": 1, "box": 1, "corners": 2}
SIDES = ("left", "right")


@register("objective", "region_text")
class RegionText(RegionAlign):
    """Tokens of a query transformer or perceiver, in groups: each group spells one thing out, or is about nothing.

    The first token of a group aims at the LLM's word for the thing, ``side`` at its word for the side on which it lies,
    the two of ``corners`` at the box tokens of its upper left and lower right corner (``mmllm.model.box_tokens``), and
    ``box`` at the sum of both. What an LLM sees is what it would read in a text such as ``cat <box>...</box>``, and
    what comes after a word that was read is what its attention copies without having to learn it (induction heads,
    arXiv 2209.11895). Written into one token with the name, as ``region_box`` does it, the box has to be told apart
    from it first.

    Things are assigned to groups by their first tokens, see ``mmllm.align.matching``; the first tokens of other groups
    aim at a learned background. An item without boxes aims all first tokens at its label.

    Args:
        stream: whose ``token_embedding`` is aligned; on no grid, as many tokens as fill groups.
        dim: width of the word embeddings.
        words: the stream of the LLM's word embeddings.
        parts: of a group, in order; ``name`` first.
        part_weight: weight of half the squared distance to what the parts other than the name aim at, in lengths of a
            word (1 - cosine, of tokens that long).
        soft: distance of a thing's centre from the picture's middle, as a share of its side, at which it lies fully on
            one side; nearer to the middle its side is between the two words.
        scale, background_weight, norm_weight, pull_weight: as of ``region_align``, for the first tokens (the norm for
            all).

    Raises:
        UserError: unknown parts, the name not first; word embeddings too narrow for boxes; tokens on a grid, or a
            number of them that fills no groups.
    """

    axes: Tensor
    sides: Tensor

    def __init__(
        self,
        stream: str,
        dim: int,
        words: str,
        parts: Sequence[str] = ("name", "corners"),
        part_weight: float = 4.0,
        soft: float = 0.1,
        scale: float = 20.0,
        background_weight: float = 0.2,
        norm_weight: float = 0.05,
        pull_weight: float = 1.0,
    ):
        super().__init__(stream, dim, scale, background_weight, norm_weight, pull_weight)
        for part in parts:
            if part not in TOKENS:
                raise unknown("part", part, TOKENS, "objective 'region_text'")
        if not parts or parts[0] != "name" or len(set(parts)) < len(parts):
            raise UserError(f"parts {list(parts)}", "objective 'region_text'", "name each once, 'name' first")
        self.words, self.parts, self.part_weight, self.soft = words, tuple(parts), part_weight, soft
        self.group = sum(TOKENS[part] for part in parts)
        try:
            self.register_buffer("axes", box_axes(dim) if {"box", "corners"} & set(parts) else torch.zeros(0))
        except ValueError as e:
            raise UserError(f"boxes need {e}", "objective 'region_text'", "parts without boxes") from None
        self.register_buffer("sides", torch.zeros(len(SIDES), dim))

    def setup(self, model: nn.Module) -> None:
        self.sides.copy_(pooled_texts(model.tower(self.words), SIDES))  # type: ignore[operator]

    def forward(self, batch: AlignBatch) -> dict[str, Tensor]:
        stream = batch.streams[self.stream]
        tokens, mask = stream.token_embedding, stream.token_mask
        assert tokens is not None and mask is not None
        self._check(tokens, stream.grid)
        words, index = batch.extras["vocabulary"]["embedding"].to(tokens), batch.extras["vocabulary"]["index"]
        first = mask[:, :: self.group]
        logits, length = self.logits(tokens, words)
        owner, target = self.assigned(tokens, first, words, batch, index)
        found = self.named(logits[:, :: self.group], target, first)
        norm = ((length - 1).pow(2) * mask).sum() / mask.sum().clamp(min=1)
        told = {"word_accuracy": found["accuracy"], "word_cosine": found["cosine"]}
        loss = found["match"] + self.norm_weight * norm + self.pull_weight * (1 - found["cosine"])
        on_thing = owner >= 0
        if len(self.parts) > 1 and on_thing.any():
            places = torch.tensor([t["xyxy"] for things in batch.boxes or [] for t in things]).to(tokens)
            wanted = self.wanted(places[owner[on_thing]], words)
            groups = tokens.unflatten(1, (-1, self.group))[on_thing][:, 1:]
            near = F.cosine_similarity(groups - words.mean(0), wanted, dim=-1).float()  # [N, group - 1]
            size = (words - words.mean(0)).norm(dim=-1).mean()
            off = ((groups - words.mean(0)) / size - F.normalize(wanted, dim=-1)).float()
            loss = loss + self.part_weight * off.pow(2).sum(-1).mean() / 2
            told |= {f"{k}_cosine": v for k, v in zip(self._names(), near.detach().mean(0))}
        return {"loss": loss, **{k: v.detach() for k, v in told.items()}}

    def named(self, logits: Tensor, target: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Classification of first tokens: logits [B, G, V + 1], target and mask [B, G]."""
        background = logits.shape[-1] - 1
        weight = torch.ones(background + 1, device=logits.device)
        weight[-1] = self.background_weight
        each = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view(target.shape)
        share = weight[target] * mask
        about = mask & (target < background)
        count = about.sum().clamp(min=1)
        cosine = (logits / self.scale).gather(-1, target[..., None])[..., 0]
        return {
            "match": (each * share).sum() / share.sum().clamp(min=1e-6),
            "accuracy": ((logits.argmax(-1) == target) & about).sum() / count,
            "cosine": (cosine * about).sum() / count,
        }

    def assigned(
        self, tokens: Tensor, mask: Tensor, words: Tensor, batch: AlignBatch, index: dict[str, int]
    ) -> tuple[Tensor, Tensor]:
        """For each group the number of its thing among all of the batch (-1: none), and its word; both [B, G]."""
        first = tokens[:, :: self.group]
        held = batch.boxes or [[] for _ in range(len(tokens))]
        owner = assigned_things(first, mask, words, index, held)
        names = [index[t["text"]] for things in held for t in things]
        counts = torch.tensor([len(things) for things in held], device=tokens.device)
        owner = torch.where(owner >= 0, owner + (counts.cumsum(0) - counts)[:, None], -1)
        target = torch.tensor([*names, len(index)], device=tokens.device)[owner]  # -1 is the last one, background
        if batch.labels:
            bare = torch.tensor([not things for things in held], device=tokens.device)
            labels = torch.tensor([index.get(name, len(index)) for name in batch.labels], device=tokens.device)
            target = torch.where(bare[:, None], labels[:, None], target)
        return owner, target

    def wanted(self, boxes: Tensor, words: Tensor) -> Tensor:
        """Boxes [N, 4] in 0..1 -> what the tokens after the name aim at, around the mean word: [N, group - 1, D]."""
        out = []
        for part in self.parts[1:]:
            if part == "side":
                low, high = F.normalize(self.sides.to(words) - words.mean(0), dim=-1)
                right = (((boxes[:, 0] + boxes[:, 2]) / 2 - 0.5) / self.soft).clamp(-1, 1)[:, None] / 2 + 0.5
                out.append(low * (1 - right) + high * right)
            else:
                code = torch.einsum("nkw,kwd->nkd", waves(boxes.float()), self.axes.float()).to(words)
                out += [code.sum(1)] if part == "box" else [code[:, 0] + code[:, 1], code[:, 2] + code[:, 3]]
        return torch.stack(out, 1)

    def _names(self) -> list[str]:
        corners = ("upper_left", "lower_right")
        return [name for part in self.parts[1:] for name in (corners if part == "corners" else (part,))]

    def _check(self, tokens: Tensor, grid: tuple[int, ...] | None) -> None:
        count = tokens.shape[1]
        if grid is not None:
            do = "take a connector of queries, such as qformer or perceiver"
            raise UserError(f"'{self.stream}' has its tokens on a grid", "objective 'region_text'", do)
        if count % self.group:
            what = f"'{self.stream}' has {count} tokens, which are no groups of {self.group}"
            raise UserError(what, "objective 'region_text'", f"take {count - count % self.group or self.group} queries")
