"""AlignModel: towers, pooled heads and connectors per stream, and a temperature per pair of streams."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmllm.align.config import HeadConfig
from mmllm.contracts import Connector, Features, Stream, Tower
from mmllm.errors import UserError
from mmllm.towers import audio_inputs, image_inputs, set_image_size, video_inputs

MAX_LOGIT_SCALE = 100.0


class ProjectionHead(nn.Sequential):
    """Tower width -> shared space: LayerNorm?, dropout, hidden layer with GELU or ReLU?, linear; or nothing."""

    def __init__(self, in_dim: int, out_dim: int, config: HeadConfig):
        if config.identity:
            if in_dim != out_dim:
                what = f"an identity head needs a tower as wide as the shared space: {in_dim} against {out_dim}"
                raise UserError(what, "head", "set embedding_dim, or take a linear head")
            super().__init__()
            self.config = config
            return
        layers: list[nn.Module] = [nn.LayerNorm(in_dim)] if config.norm else []
        width = in_dim
        if config.hidden_dim:
            layers += [nn.Dropout(config.dropout), nn.Linear(in_dim, config.hidden_dim)]
            layers.append(nn.ReLU() if config.activation == "relu" else nn.GELU())
            width = config.hidden_dim
        layers += [nn.Dropout(config.dropout), nn.Linear(width, out_dim, bias=config.bias)]
        super().__init__(*layers)
        self.config = config


class AlignModel(nn.Module):
    """Everything that the contrastive stage trains.

    Attributes:
        tower_of: stream -> key in ``towers`` (streams may share a tower).
        image_size: stream -> side of its pictures.
        max_logit_scale: what ``scale`` never exceeds; None: no limit (SigLIP's released scales are above 100).
        active: parts such as ``image.head`` that train; everything else stays in eval mode, dropout and
            BatchNorm included.
    """

    def __init__(
        self,
        towers: dict[str, Tower],
        tower_of: dict[str, str],
        heads: dict[str, ProjectionHead],
        connectors: dict[str, Connector],
        pairs: Sequence[tuple[str, str]] = (),
        embedding_dim: int = 256,
    ):
        super().__init__()
        self.towers, self.heads = nn.ModuleDict(towers), nn.ModuleDict(heads)
        self.connectors = nn.ModuleDict(connectors)
        self.tower_of, self.embedding_dim = dict(tower_of), embedding_dim
        self.image_size: dict[str, int] = {}
        names = [":".join(p) for p in pairs]
        # CLIP's start 1 / 0.07 for softmax; SigLIP's bias is set by the objective that uses it.
        self.logit_scale = nn.ParameterDict({n: nn.Parameter(torch.tensor(math.log(1 / 0.07))) for n in names})
        self.logit_bias = nn.ParameterDict({n: nn.Parameter(torch.tensor(0.0)) for n in names})
        self.max_logit_scale: float | None = MAX_LOGIT_SCALE
        self.active: set[str] = set()

    def tower(self, stream: str) -> Tower:
        """The tower that reads a stream.

        Raises:
            UserError: no such stream.
        """
        if stream not in self.tower_of:
            raise UserError(f"this model has no stream '{stream}'", do=f"it has: {', '.join(self.tower_of)}")
        return self.towers[self.tower_of[stream]]  # type: ignore[return-value]

    def head_config(self, stream: str) -> HeadConfig | None:
        """Config of a stream's pooled head, None where it has none."""
        head: Any = self.heads[stream] if stream in self.heads else None
        return head.config if head is not None else None

    def parts(self) -> dict[str, nn.Module]:
        """``image.tower``, ``image.head``, ``image.connector``... -> module; a shared tower stands under its owner."""
        found: dict[str, nn.Module] = {f"{k}.tower": v for k, v in self.towers.items()}
        found |= {f"{k}.head": v for k, v in self.heads.items()}
        return found | {f"{k}.connector": v for k, v in self.connectors.items()}

    def train(self, mode: bool = True) -> AlignModel:
        super().train(mode)
        for name, module in self.parts().items():
            if name not in self.active:
                module.eval()
        return self

    def features(self, stream: str, inputs: dict[str, Any]) -> Features:
        """Features from ready ones (``tokens`` and/or ``pooled``) or by running the tower on its inputs."""
        if "pooled" not in inputs and "tokens" not in inputs:
            return self.tower(stream)(**inputs)
        tokens, pooled = inputs.get("tokens"), inputs.get("pooled")
        some = tokens if tokens is not None else pooled
        assert some is not None
        tokens = pooled[:, None] if tokens is None and pooled is not None else tokens
        assert tokens is not None
        mask = inputs.get("mask")
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=some.device) if mask is None else mask.bool()
        if pooled is None:
            weight = mask[..., None].to(tokens.dtype)
            pooled = (tokens * weight).sum(1) / weight.sum(1).clamp(min=1)
        grid = inputs.get("grid")
        return Features(tokens.float(), mask, pooled.float(), grid=tuple(grid) if grid is not None else None)

    def stream(self, name: str, inputs: dict[str, Any], want: Sequence[str] = ("embedding",)) -> Stream:
        """Runs what ``want`` names: ``embedding`` (head) and ``token_embedding`` (connector).

        Args:
            inputs: tower inputs or cached features, one row per item.
        """
        out = Stream(self.features(name, inputs))
        assert out.features is not None
        if "embedding" in want:
            if name not in self.heads:
                raise UserError(f"stream '{name}' has no head", do=f"add streams.{name}.head")
            out.embedding = F.normalize(self.heads[name](out.features.pooled).float(), dim=-1)
        if "token_embedding" in want:
            if name not in self.connectors:
                raise UserError(f"stream '{name}' has no connector", do=f"add streams.{name}.connector")
            tokens, out.token_mask = self.connectors[name](out.features)
            out.token_embedding = tokens.float()
        return out

    def scale(self, pair: str) -> Tensor:
        """The exponentiated temperature of a pair, at most ``max_logit_scale``."""
        scale = self.logit_scale[pair].exp()
        return scale if self.max_logit_scale is None else scale.clamp(max=self.max_logit_scale)

    def inputs(self, stream: str, items: Sequence[Any]) -> dict[str, Any]:
        """Tower inputs from PIL pictures, lists of frames, waves at the extractor's rate, or texts."""
        tower = self.tower(stream)
        if tower.modality == "text":
            return tower.encode(list(items))  # type: ignore[attr-defined]
        processor, size = tower.preprocessor(), self.image_size.get(stream)
        if tower.modality == "audio":
            return dict(audio_inputs(processor, list(items)))
        if size:
            set_image_size(processor, size)
        if tower.modality == "video":
            return dict(video_inputs(processor, list(items)))
        return dict(image_inputs(processor, list(items)))

    @torch.no_grad()
    def embed(self, stream: str, items: Sequence[Any], batch_size: int = 64) -> Tensor:
        """Unit vectors [N, embedding_dim] of pictures (PIL), videos, waves or texts."""
        was = self.training
        self.eval()
        out = [
            self.stream(stream, self.inputs(stream, items[i : i + batch_size])).embedding
            for i in range(0, len(items), batch_size)
        ]
        self.train(was)
        return torch.cat([e for e in out if e is not None]) if out else torch.empty(0, self.embedding_dim)
