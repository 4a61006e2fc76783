"""The query transformer's own first stage: contrast, matching and captioning through its queries (BLIP-2)."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmllm.align.gather import gather_rows
from mmllm.blocks.lm_head_loss import lm_head_loss
from mmllm.blocks.ranks import Ranks
from mmllm.blocks.tiled_contrast import contrast
from mmllm.connectors.qformer import QFormerConnector
from mmllm.contracts import AlignBatch, Features, Objective
from mmllm.errors import UserError
from mmllm.registry import register


@register("objective", "qformer")
class QFormerStage(Objective):
    """Teaches the queries of a ``qformer`` connector to bring along what a text says (arXiv 2301.12597, section 3.1).

    - contrast: of the queries the one most like the text's first token counts; InfoNCE over the batch, queries and
      text unseen by each other.
    - match: two classes, right and wrong pair, from the mean of the logits of all queries, which see the text. Wrong
      pairs are drawn by their similarity (hard negatives): a wrong picture for each text and a wrong text for each
      picture.
    - caption: each token of the text, and its end, from the queries and the tokens before it, among the LLM's words.

    Texts that are alike belong together, whichever item they come from; an item that lacks picture or text takes no
    part. What only this stage needs (projections, classifier) is not part of the connector and stays behind.

    Args:
        stream: whose connector trains; name it in the phase's ``trains``.
        text: a stream of ``word_embeddings``, of the LLM that the connector leads to.
        width: of the space of the contrast.
        label_smoothing: of the contrast.

    Raises:
        UserError: a connector that is no ``qformer`` with ``text_dim`` and ``text_output``, a text stream that is not
            made of word embeddings, or no weight above 0.
    """

    two_pass = False  # it goes through the connector itself
    gathered = False

    def __init__(
        self,
        stream: str,
        text: str,
        contrast: float = 1.0,
        match: float = 1.0,
        caption: float = 1.0,
        width: int = 256,
        label_smoothing: float = 0.1,
    ):
        super().__init__()
        self.weights = {"contrast": contrast, "match": match, "caption": caption}
        if min(self.weights.values()) < 0 or not any(self.weights.values()):
            raise UserError("weights must be at least 0, and one above", "objective 'qformer'")
        self.stream, self.text, self.width, self.label_smoothing = stream, text, width, label_smoothing
        self.needs = frozenset({f"{stream}.tokens", f"{text}.tokens", f"{text}.input_ids"})
        self.model: tuple[Any, ...] = ()  # in a tuple, so that its parameters are not this objective's

    def setup(self, model: nn.Module) -> None:
        found: Any = model
        connector = found.connectors[found.owner(self.stream, "connector")]
        where = f"streams.{self.stream}.connector"
        if not isinstance(connector, QFormerConnector) or connector.norm_text_out is None:
            do = "use {type: qformer, text_dim: auto, text_output: true}"
            raise UserError("the first stage of a query transformer needs one that reads texts", where, do)
        tower = found.tower(self.text)
        if not hasattr(tower, "weight") or tower.hidden_size != cast(nn.Linear, connector.text_in).in_features:
            do = f"give it a tower of type word_embeddings with {connector.settings['text_dim']} numbers a word"
            raise UserError("its words are not those that the connector reads", f"streams.{self.text}", do)
        self.model, hidden = (model,), connector.queries.shape[1]
        self.end = tower.preprocessor().eos_token_id
        self.cls, self.dec = (nn.Parameter(torch.randn(hidden) * 0.02) for _ in range(2))
        self.query_proj, self.text_proj = nn.Linear(hidden, self.width), nn.Linear(hidden, self.width)
        self.matcher, self.to_words = nn.Linear(hidden, 2), nn.Linear(hidden, tower.hidden_size)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    @property
    def connector(self) -> QFormerConnector:
        """The connector as it is now: a phase may have made it anew."""
        model = self.model[0]
        return model.connectors[model.owner(self.stream, "connector")]

    def forward(self, batch: AlignBatch) -> dict[str, Tensor]:
        picture, text, of = self._paired(batch)
        nothing = 0.0 * torch.stack([p.sum() for p in self.parameters()]).sum()  # so that all processes have gradients
        if not len(of):
            return {"loss": nothing}
        parts: dict[str, Tensor] = {}
        if self.weights["contrast"] or self.weights["match"]:
            parts["contrast"], scores = self._contrast(picture, text, of, batch.ranks)
            if self.weights["match"]:
                parts |= self._match(picture, text, of, scores)
        if self.weights["caption"]:
            parts["caption"] = self._caption(_rows(picture, of), text, batch.ranks)
        return {"loss": nothing + sum(w * parts[k] for k, w in self.weights.items() if w and k in parts), **parts}

    def _paired(self, batch: AlignBatch) -> tuple[Features, Features, Tensor]:
        """Features of the pictures, features of the texts that have one, and which picture each text has, [T]."""
        image, words = batch.streams[self.stream], batch.streams[self.text]
        assert image.features is not None and words.features is not None
        device = words.features.tokens.device

        def owners(owner: Tensor | None, count: int) -> Tensor:
            return torch.arange(count, device=device) if owner is None else owner

        own = owners(image.owner, len(image.features.tokens))
        theirs = owners(words.owner, len(words.features.tokens))
        at = theirs.new_full((len(batch),), -1)
        at[own] = torch.arange(len(own), device=device)
        keep = at[theirs] >= 0
        return image.features, _rows(words.features, keep), at[theirs[keep]]

    def _contrast(self, picture: Features, text: Features, of: Tensor, ranks: Ranks | None) -> tuple[Tensor, Tensor]:
        """The loss, and the cosines [I, T] of this process's pictures and texts."""
        queries, words = self.connector.separate(picture, text, self.cls)
        rows = F.normalize(self.query_proj(queries), dim=-1)
        columns = F.normalize(self.text_proj(words[:, 0]), dim=-1)
        said = _said(text)
        if ranks is None:
            alike = _alike(len(rows), said, of)
        else:
            said = cast(Tensor, gather_rows(said, ranks))
            alike = _alike(len(rows) * ranks.size, said, ranks.gather(of + ranks.rank * len(rows)))
        how: dict[str, Any] = {
            "scale": self.logit_scale.exp().clamp(max=100), "label_smoothing": self.label_smoothing, "ranks": ranks,
        }  # fmt: skip
        forth = contrast(rows, columns, score_fn=_best, target_fn=lambda i, j: alike[i, j], **how)
        back = contrast(columns, rows, score_fn=lambda c, r: _best(r, c).T, target_fn=lambda j, i: alike.T[j, i], **how)
        named = torch.zeros(len(rows), dtype=torch.bool, device=of.device)
        named[of] = True  # a picture without a text has nothing to find
        with torch.no_grad():
            scores = _best(rows, columns)
        return 0.5 * (forth[named].mean() + back.mean()), scores

    def _match(self, picture: Features, text: Features, of: Tensor, scores: Tensor) -> dict[str, Tensor]:
        """Right pairs against as many with a wrong picture, and as many with a wrong text."""
        alike = _alike(len(scores), _said(text), of)
        odds = (scores * self.logit_scale.detach().exp().clamp(max=100)).float().masked_fill(alike, -torch.inf)
        everyone = torch.arange(len(of), device=of.device)
        rich, poor = (~alike).any(0), (~alike[of]).any(1)  # where there is a wrong picture, a wrong text
        wrong_picture = odds.T[rich].softmax(-1).multinomial(1)[:, 0] if rich.any() else of[:0]
        wrong_text = odds[of[poor]].softmax(-1).multinomial(1)[:, 0] if poor.any() else of[:0]
        pictures = torch.cat([of, wrong_picture, of[poor]])
        texts = torch.cat([everyone, everyone[rich], wrong_text])
        right = (torch.arange(len(pictures), device=of.device) < len(of)).long()
        queries = self.connector.joint(_rows(picture, pictures), _rows(text, texts), "bidirectional", self.cls)[0]
        logits = self.matcher(queries).mean(1).float()
        hit = (logits.argmax(-1) == right).float().mean()
        return {"match": F.cross_entropy(logits, right), "match_accuracy": hit}

    def _caption(self, picture: Features, text: Features, ranks: Ranks | None) -> Tensor:
        """Mean over the tokens of all processes; one row of pictures for each text."""
        _, words, there = self.connector.joint(picture, text, "causal", self.dec)
        assert text.input_ids is not None
        after = F.pad(text.input_ids, (0, 1))
        if self.end is None:
            there = F.pad(text.mask, (0, 1))
        else:
            after[torch.arange(len(after)), text.mask.sum(1)] = self.end
        states, table = self.to_words(words[there]), self.model[0].tower(self.text).weight
        loss = lm_head_loss(states, table.to(states.dtype), after[there])
        if ranks is None:
            return loss
        count = there.sum().float()
        everywhere = count.clone()
        ranks.sum(everywhere)
        return loss * count * ranks.size / everywhere


def _said(text: Features) -> Tensor:
    """What each text says, [T, L]: rows are equal where the texts are; 0 is padding."""
    assert text.input_ids is not None
    return (text.input_ids + 1) * text.mask


def _alike(pictures: int, said: Tensor, of: Tensor) -> Tensor:
    """Which texts belong to each picture, bool [I, T]: its own, and those that say the same."""
    number = torch.unique(said, dim=0, return_inverse=True)[1]
    held = torch.zeros(pictures, int(number.max()) + 1, dtype=torch.bool, device=of.device)
    held[of, number] = True
    return held[:, number]


def _best(queries: Tensor, texts: Tensor) -> Tensor:
    """[I, K, P], [T, P] -> [I, T], by the query most like the text."""
    return torch.einsum("ikp,tp->itk", queries, texts).amax(-1)


def _rows(features: Features, rows: Tensor) -> Features:
    """Some of the rows, by number or by a bool mask."""
    kept = {k: getattr(features, k)[rows] for k in ("tokens", "mask", "pooled")}
    ids = None if features.input_ids is None else features.input_ids[rows]
    return Features(**kept, grid=features.grid, num_prefix=features.num_prefix, input_ids=ids)
