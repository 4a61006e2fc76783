"""AlignModel: towers, pooled heads and connectors per stream, and a temperature per pair of streams."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmllm.align.config import HeadConfig
from mmllm.blocks.dropout import Dropout
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
            layers += [Dropout(config.dropout), nn.Linear(in_dim, config.hidden_dim)]
            layers.append(nn.ReLU() if config.activation == "relu" else nn.GELU())
            width = config.hidden_dim
        layers += [Dropout(config.dropout), nn.Linear(width, out_dim, bias=config.bias)]
        super().__init__(*layers)
        self.config = config


class AlignModel(nn.Module):
    """Everything that the contrastive stage trains.

    Attributes:
        tower_of: stream -> key in ``towers`` (streams may share a tower).
        image_size: stream -> side of its pictures.
        max_logit_scale: what ``scale`` never exceeds; None: no limit (SigLIP's released scales are above 100).
        of: derived stream -> the stream whose tower, head and connector it goes through.
        started: pairs whose bias an initial model or an earlier phase with the sigmoid loss has set.
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
        self.of: dict[str, str] = {}
        self.started: set[str] = set()
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
        base = self.base(stream)
        if base not in self.tower_of:
            raise UserError(f"this model has no stream '{stream}'", do=f"it has: {', '.join(self.tower_of)}")
        return self.towers[self.tower_of[base]]  # type: ignore[return-value]

    def base(self, stream: str) -> str:
        """The stream itself, or the one that it is derived from."""
        return self.of.get(stream, stream)

    def owner(self, stream: str, kind: str) -> str:
        """Under which name a stream's ``head`` or ``connector`` stands: its own, or that of its base.

        Raises:
            UserError: neither has one.
        """
        held = self.heads if kind == "head" else self.connectors
        name = next((n for n in (stream, self.base(stream)) if n in held), None)
        if name is None:
            raise UserError(f"stream '{stream}' has no {kind}", do=f"add streams.{self.base(stream)}.{kind}")
        return name

    def modules_of(self, stream: str, want: Iterable[str] = ("embedding", "token_embedding")) -> dict[str, nn.Module]:
        """``tower``, and ``head`` and ``connector`` as far as ``want`` needs them."""
        found: dict[str, nn.Module] = {"tower": self.tower(stream)}
        if "embedding" in want:
            found["head"] = self.heads[self.owner(stream, "head")]
        if "token_embedding" in want:
            found["connector"] = self.connectors[self.owner(stream, "connector")]
        return found

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

    def stream(
        self,
        name: str,
        inputs: dict[str, Any],
        want: Iterable[str] = ("embedding",),
        modules: Mapping[str, nn.Module] | None = None,
    ) -> Stream:
        """Runs what ``want`` names (see ``Objective.needs``, without the stream's name).

        Args:
            inputs: tower inputs or cached features, one row per item.
            modules: another tower, head and connector than the stream's own (a teacher's).
        """
        want = set(want)
        modules = self.modules_of(name, want) if modules is None else modules
        features = self.features(name, inputs, tuple(layers_in(want)), modules["tower"])
        # What nobody asks for is not kept: of a big batch made in chunks, tokens would be most of the memory.
        out = Stream(features if want - {"embedding", "token_embedding"} else None)
        if "embedding" in want:
            out.embedding = F.normalize(modules["head"](features.pooled).float(), dim=-1)
        if "token_embedding" in want:
            connector: Any = modules["connector"]
            tokens, out.token_mask = connector(features)
            out.token_embedding = tokens.float()
            out.grid = connector.out_grid(features.grid)
        return out

    def features(
        self, stream: str, inputs: dict[str, Any], layers: Sequence[int] = (), tower: nn.Module | None = None
    ) -> Features:
        """Features from ready ones (``tokens`` and/or ``pooled``) or by running the tower on its inputs."""
        if "pooled" not in inputs and "tokens" not in inputs:
            tower = self.tower(stream) if tower is None else tower
            return tower(**inputs, **({"layers": layers} if layers else {}))
        return ready_features(inputs)

    def scale(self, pair: str) -> Tensor:
        """The exponentiated temperature of a pair, at most ``max_logit_scale``."""
        scale = self.logit_scale[pair].exp()
        return scale if self.max_logit_scale is None else scale.clamp(max=self.max_logit_scale)

    def inputs(self, stream: str, items: Sequence[Any]) -> dict[str, Any]:
        """Tower inputs from PIL pictures, lists of frames, waves at the extractor's rate, or texts."""
        tower = self.tower(stream)
        if tower.modality == "text":
            return tower.encode(list(items))  # type: ignore[attr-defined]
        processor, size = tower.preprocessor(), self.image_size.get(self.base(stream))
        if size and tower.modality != "audio":
            set_image_size(processor, size)
        return media_inputs(tower.modality, processor, items)

    def gradient_checkpointing_enable(self) -> None:
        """Lets towers that train keep no activations inside their layers; the backward makes them again.

        Raises:
            UserError: a tower that trains has no layers that could.
        """
        for name in self.towers:
            if f"{name}.tower" not in self.active:
                continue
            tower = self.tower(name)
            try:
                tower.gradient_checkpointing_enable()
            except (NotImplementedError, ValueError):
                what = f"the tower of '{name}' ({type(tower).__name__}) knows no gradient checkpointing"
                do = "leave train.gradient_checkpointing out, or take chunk_size for large batches"
                raise UserError(what, f"streams.{name}", do) from None

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


def pooled_texts(
    tower: Tower, texts: Sequence[str], batch_size: int = 64, mapped: Callable[..., Iterable[Tensor]] = map
) -> Tensor:
    """A text tower's pooled features [N, D] in float32, in main memory, wherever the tower is.

    Args:
        mapped: maps batches to rows in their order; that of a pool of threads computes several at once.
    """
    device = next(tower.parameters()).device
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # batches of equal length have little padding
    # Tokenizers are not safe among threads, so they come first.
    batches = [
        tower.encode([texts[k] for k in order[i : i + batch_size]])  # type: ignore[attr-defined]
        for i in range(0, len(texts), batch_size)
    ]

    @torch.inference_mode()
    def pooled(inputs: dict[str, Tensor]) -> Tensor:
        return tower(**{k: v.to(device) for k, v in inputs.items()}).pooled.float().cpu()

    rows = list(mapped(pooled, batches))
    return torch.cat(rows)[torch.tensor(order).argsort()]


def media_inputs(modality: str, processor: Any, items: Sequence[Any]) -> dict[str, Any]:
    """Tower inputs from PIL pictures, lists of frames, or waves."""
    make = {"audio": audio_inputs, "video": video_inputs}.get(modality, image_inputs)
    return dict(make(processor, list(items)))


def layers_in(want: Iterable[str]) -> list[int]:
    """The layer numbers of ``layers[K]`` needs."""
    return sorted(int(w[7:-1]) for w in want if w.startswith("layers["))


def ready_features(inputs: dict[str, Any]) -> Features:
    """Features from cached ``tokens`` and/or ``pooled`` (with ``mask``, ``grid``, ``num_prefix``)."""
    tokens, pooled = inputs.get("tokens"), inputs.get("pooled")
    tokens = pooled[:, None] if tokens is None and pooled is not None else tokens
    assert tokens is not None
    mask = inputs.get("mask")
    mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device) if mask is None else mask.bool()
    if pooled is None:
        weight = mask[..., None].to(tokens.dtype)
        pooled = (tokens * weight).sum(1) / weight.sum(1).clamp(min=1)
    grid = inputs.get("grid")
    grid = tuple(grid) if grid is not None else None
    return Features(tokens.float(), mask, pooled.float(), grid, inputs.get("num_prefix", 0))
