"""CLSR: Contrastive Latent Space Reconstruction Learning for Audio-Text Retrieval (arXiv 2309.08839).

slug: clsr-reconstruct
number: 67
shelf: 1
kind: objective
config: "objectives: [{type: clsr, options: {pair: [audio, text]}}]"
left_out: the pretrained encoders, AudioCaps and Clotho. No code was released to check the paper's constants against, so
  its three parts are switches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmllm.align.objectives import PairObjective
from mmllm.blocks.items import item_rows
from mmllm.blocks.tiled_contrast import contrast
from mmllm.contracts import AlignBatch
from mmllm.errors import UserError
from mmllm.registry import register


@register("objective", "clsr")
class CLSR(PairObjective):
    """InfoNCE with negatives of the own modality too, a temperature for each pair, and decoders of the embeddings.

    With ``spread`` 0, ``intra`` off and ``reconstruct`` 0 it is InfoNCE at a fixed temperature. Of an item with several
    captions the mean of them counts.

    Args:
        temperature: of a pair that belongs together; None: the pair's learned one.
        intra: other items' embeddings of the same modality stand in the denominator as well.
        spread: how much higher the temperature of a negative is that is alike already: ``T (1 + spread g_ij)``, where
            g is the mean cosine of the towers' features in both streams, cut to 0..1. Negatives that are alike are
            pushed away less.
        centred: cosines around the batch's mean features. Without it, features that share a large common part (most
            towers') double every negative's temperature, and items that all lie in one place have almost no loss.
        reconstruct: weight of rebuilding either tower's features from either embedding, by a decoder for each stream.
        hidden_dim: of the decoders; None: the tower's width.
    """

    def __init__(
        self,
        pair: Sequence[str],
        same_label: bool = True,
        temperature: float | None = 0.07,
        intra: bool = True,
        spread: float = 1.0,
        centred: bool = True,
        reconstruct: float = 1.0,
        hidden_dim: int | None = None,
    ):
        super().__init__(pair, same_label)
        if (temperature is not None and temperature <= 0) or min(spread, reconstruct) < 0:
            raise UserError("temperature must be above 0, spread and reconstruct at least 0", "objective 'clsr'")
        self.temperature, self.intra, self.spread, self.centred = temperature, intra, spread, centred
        self.reconstruct, self.hidden_dim = reconstruct, hidden_dim
        self.gathered = True  # likeness is taken between all items of both streams
        if spread or reconstruct:
            self.needs = self.needs | {f"{s}.pooled" for s in self.pair}
        self.decoders = nn.ModuleDict()

    def setup(self, model: Any) -> None:
        for stream in self.pair if self.reconstruct else ():
            width, hidden = model.tower(stream).pooled_size, self.hidden_dim or model.tower(stream).pooled_size
            layers = nn.Linear(model.embedding_dim, hidden), nn.GELU(), nn.Linear(hidden, width)
            self.decoders[stream] = nn.Sequential(*layers)

    def forward(self, batch: AlignBatch) -> dict[str, Tensor]:
        size, embeddings, features, there = len(batch), [], [], []
        for name in self.pair:
            stream = batch.streams[name]
            assert stream.embedding is not None
            rows, here = item_rows(stream.embedding, stream.owner, size)
            embeddings.append(F.normalize(rows, dim=-1))
            there.append(here)
            if self.spread or self.reconstruct:
                assert stream.features is not None
                features.append(item_rows(stream.features.pooled.detach().float(), stream.owner, size)[0])
        both = there[0] & there[1]
        z, f = [x[both] for x in embeddings], [x[both] for x in features]
        chosen = both.nonzero().flatten()
        same = self._matrix(batch, chosen)
        scale = batch.logit_scale[self.pair_name] if self.temperature is None else 1 / self.temperature
        each = self.contrast(z, self.factor(f, same), same, scale)
        out = {"loss": each.new_zeros(size).index_put((chosen,), each), "valid": both}
        if self.reconstruct and len(chosen):
            rebuilt = self.rebuilding(z, f)
            out["loss"] = out["loss"].index_add(0, chosen, self.reconstruct * rebuilt)
            out["reconstruction"] = rebuilt.mean()
        return out

    def _matrix(self, batch: AlignBatch, chosen: Tensor) -> Tensor:
        """Which of the chosen items belong together, [n, n] bool."""
        names = batch.label_ids if self.same_label else None
        if names is None and self.same_label and batch.labels is not None:
            number = {label: i for i, label in enumerate(dict.fromkeys(batch.labels))}
            names = torch.tensor([number[label] for label in batch.labels])
        names = torch.arange(len(batch)) if names is None else names
        names = names.to(chosen.device)[chosen]
        return names[:, None] == names[None]

    def factor(self, features: Sequence[Tensor], same: Tensor) -> Tensor:
        """1 / (1 + spread g_ij), 1 where items belong together; [n, n]."""
        if not self.spread:
            return torch.ones(same.shape, device=same.device)
        unit = [F.normalize(f - f.mean(0) if self.centred else f, dim=-1) for f in features]
        alike = sum(u @ u.T for u in unit) / 2
        return (1 / (1 + self.spread * alike.clamp(0, 1))).masked_fill(same, 1.0)  # type: ignore[union-attr]

    def contrast(self, z: Sequence[Tensor], factor: Tensor, same: Tensor, scale: Any) -> Tensor:
        """The mean of both directions, [n]."""
        target, allow, factors = same, torch.ones_like(same), factor
        if self.intra:
            target = torch.cat([same, torch.zeros_like(same)], 1)
            allow, factors = torch.cat([allow, ~same], 1), torch.cat([factor, factor], 1)
        found = [
            contrast(
                x, y, extra_cols=x if self.intra else None, scale=scale, target_fn=lambda i, j: target[i, j],
                allow_fn=lambda i, j: allow[i, j], scale_fn=lambda i, j: factors[i, j],
            )
            for x, y in (z, z[::-1])
        ]  # fmt: skip
        return 0.5 * (found[0] + found[1])

    def rebuilding(self, z: Sequence[Tensor], features: Sequence[Tensor]) -> Tensor:
        """Squared distance of both towers' unit features from what is decoded from both embeddings, [n]."""
        targets = {s: F.normalize(f, dim=-1) for s, f in zip(self.pair, features)}
        return sum((self.decoders[s](x) - t).square().sum(-1) for x in z for s, t in targets.items())  # type: ignore
