"""CLIPModel, SiglipModel and ClapModel folders to aligned models and back, weight for weight."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig

from mmllm.align.config import HeadConfig
from mmllm.align.model import AlignModel, ProjectionHead
from mmllm.errors import UserError, unknown
from mmllm.towers.hf import HFTower
from mmllm.towers.hf_audio import HFAudioTower
from mmllm.towers.hf_text import HFTextTower
from mmllm.towers.hf_vision import HFVisionTower
from mmllm.towers.training import merged


@dataclass(frozen=True)
class Layout:
    """Where a two-tower model of transformers keeps its parts.

    Attributes:
        name: its class.
        media: the tower beside the text tower: ``vision`` or ``audio``.
        heads: ``matrix`` (one linear layer without bias), ``mlp`` (two with an activation between) or ``none``.
        scales: names of the logit scales, media to text first.
    """

    name: str
    media: str
    heads: str
    scales: tuple[str, ...] = ("logit_scale",)
    biased: bool = False


LAYOUTS = {
    "clip": Layout("CLIPModel", "vision", "matrix"),
    "siglip": Layout("SiglipModel", "vision", "none", biased=True),
    "siglip2": Layout("Siglip2Model", "vision", "none", biased=True),
    "clap": Layout("ClapModel", "audio", "mlp", ("logit_scale_a", "logit_scale_t")),
}
STREAM = {"vision": "image", "audio": "audio"}
TOWER: dict[str, type[HFTower]] = {"vision": HFVisionTower, "audio": HFAudioTower}
PROJECTION = {"vision": "visual_projection", "audio": "audio_projection", "text": "text_projection"}


def import_align(path: str) -> AlignModel:
    """An aligned model with the weights, scales and biases of a CLIPModel, SiglipModel, Siglip2Model or ClapModel.

    Its embeddings are the source's ``get_image_features`` / ``get_audio_features`` and ``get_text_features``,
    normalised. Streams are ``image`` or ``audio``, and ``text``; CLAP's two scales stand under ``audio:text`` and
    ``text:audio``.

    Args:
        path: local folder or hub id.

    Raises:
        UserError: another kind of model, or weights are missing.
    """
    try:
        config = AutoConfig.from_pretrained(path)
        layout = LAYOUTS.get(config.model_type)
        if layout is None:
            raise unknown("two-tower model", config.model_type, LAYOUTS, path)
        cls = getattr(transformers, layout.name)
        source, info = cls.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    except (OSError, ValueError) as e:
        raise UserError(f"cannot load a two-tower model: {str(e).splitlines()[0]}", path) from None
    if info["missing_keys"]:
        raise UserError(f"{len(info['missing_keys'])} weights are missing: {sorted(info['missing_keys'])[0]}", path)
    if layout.heads == "none" and not getattr(config.vision_config, "vision_use_head", True):
        raise UserError("its vision tower has no pooling head, so there are no embeddings", path)
    stream = STREAM[layout.media]
    parts = {stream: layout.media, "text": "text"}
    towers: dict[str, Any] = {}
    for name, part in parts.items():
        sub = getattr(config, f"{part}_config")
        kind = TOWER.get(part, HFTextTower)
        towers[name] = kind(sub.to_dict(), pooling="pooler", model=getattr(source, f"{part}_model"), source=path)
    dim = towers["text"].pooled_size if layout.heads == "none" else config.projection_dim
    heads = {n: ProjectionHead(t.pooled_size, dim, _head_config(layout, config)) for n, t in towers.items()}
    for name, part in parts.items():
        for mine, theirs in zip(linear_layers(heads[name]), linear_layers(getattr(source, PROJECTION[part], None))):
            mine.load_state_dict(theirs.state_dict())
    pairs = [(stream, "text"), ("text", stream)][: len(layout.scales)]
    model = AlignModel(towers, {n: n for n in towers}, heads, {}, pairs, dim)
    model.max_logit_scale = None  # the source has no limit
    with torch.no_grad():
        for pair, scale in zip(pairs, layout.scales):
            model.logit_scale[":".join(pair)].copy_(getattr(source, scale).reshape(()))
        if layout.biased:
            model.logit_bias[f"{stream}:text"].copy_(source.logit_bias.reshape(()))
    return model.eval()


def _head_config(layout: Layout, config: PreTrainedConfig) -> HeadConfig:
    if layout.heads == "none":
        return HeadConfig(identity=True)
    if layout.heads == "matrix":
        return HeadConfig(bias=False)
    if config.projection_hidden_act not in ("relu", "gelu"):
        raise UserError(f"heads know relu and gelu, this model's projection has {config.projection_hidden_act}")
    return HeadConfig(hidden_dim=config.projection_dim, activation=config.projection_hidden_act)


def linear_layers(module: nn.Module | None) -> list[nn.Linear]:
    """The linear layers of a head, in their order."""
    return [m for m in module.modules() if isinstance(m, nn.Linear)] if module is not None else []


def export_align(
    model: AlignModel,
    folder: str | Path,
    media: str | None = None,
    text: str = "text",
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Writes two streams of an aligned model as the CLIPModel, SiglipModel, Siglip2Model or ClapModel that they are.

    Args:
        media: the picture or sound stream; None: ``image``, or ``audio`` where there is no ``image``.
        dtype: of the saved weights. A model of half precision that was imported comes back bit for bit in its own.

    Raises:
        UserError: the shapes do not fit such a model; the message says which.
    """
    media = media or ("image" if "image" in model.tower_of else "audio")
    towers = [_plain_tower(model, s) for s in (media, text)]
    kinds = [t.config.model_type for t in towers]
    prefix = kinds[1].removesuffix("_text_model")
    layout = LAYOUTS.get(prefix)
    if layout is None or kinds[0] != f"{prefix}_{layout.media}_model":
        what = f"no two-tower model of transformers joins a '{kinds[0]}' and a '{kinds[1]}'"
        raise UserError(what, do="export needs both towers of one of: " + ", ".join(x.name for x in LAYOUTS.values()))
    for stream, tower in zip((media, text), towers):
        _check_head(model, stream, layout, tower)
    config_class = getattr(transformers, layout.name.replace("Model", "Config"))
    subs = {f"{layout.media}_config": towers[0].config.to_dict(), "text_config": towers[1].config.to_dict()}
    own = {"projection_dim": model.embedding_dim} if layout.heads != "none" else {}
    if layout.heads == "mlp":
        own["projection_hidden_act"] = model.head_config(media).activation  # type: ignore[union-attr]
    whole = getattr(transformers, layout.name)(config_class(**subs, **own))
    for part, stream, tower in zip((layout.media, "text"), (media, text), towers):
        getattr(whole, f"{part}_model").load_state_dict(tower.model.state_dict())
        for theirs, mine in zip(
            linear_layers(getattr(whole, PROJECTION[part], None)), linear_layers(_head(model, stream))
        ):
            theirs.load_state_dict(mine.state_dict())
    with torch.no_grad():
        for name, value in _scales(model, layout, media, text).items():
            getattr(whole, name).copy_(value.reshape(getattr(whole, name).shape))
    whole.to(dtype).eval().save_pretrained(folder)
    for tower in towers:
        tower.save_preprocessor(folder)
    return Path(folder)


def _head(model: AlignModel, stream: str) -> Any:
    return model.heads[stream]


def _plain_tower(model: AlignModel, stream: str) -> HFTower:
    """A stream's tower, adapters merged, if it is one of transformers as it stands."""
    tower = model.tower(stream)
    if not isinstance(tower, HFTower):
        kind = tower.to_config()["model_type"]
        raise UserError(f"stream '{stream}' has a '{kind}' tower", do="only towers of transformers can be exported")
    if tower.layer != -1 or tower.pooling not in ("auto", "pooler"):
        what = f"stream '{stream}' takes layer {tower.layer} and '{tower.pooling}' pooling"
        raise UserError(what, do="an exported model always takes the last layer and its own pooled output")
    return merged(tower)  # type: ignore[return-value]


def _check_head(model: AlignModel, stream: str, layout: Layout, tower: HFTower) -> None:
    """Raises UserError where a stream's head has no place in the layout."""
    head = model.head_config(stream)
    if head is None:
        raise UserError(f"stream '{stream}' has no head", do=f"add streams.{stream}.head")
    shape = f"{tower.pooled_size} -> {head.hidden_dim or ''}{' -> ' if head.hidden_dim else ''}{model.embedding_dim}"
    has = "no layer" if head.identity else f"layers {shape}{' with LayerNorm' if head.norm else ''}"
    fits, wants = {
        "none": (head.identity, "no projection after its towers"),
        "matrix": (
            not (head.identity or head.norm or head.hidden_dim or head.bias),
            f"one matrix {tower.pooled_size} -> {model.embedding_dim} without bias",
        ),
        "mlp": (
            not (head.identity or head.norm) and head.bias and head.hidden_dim == model.embedding_dim,
            f"two layers {tower.pooled_size} -> {model.embedding_dim} -> {model.embedding_dim} with biases",
        ),
    }[layout.heads]
    if not fits:
        bias = "" if head.identity else f" with{'' if head.bias else 'out'} bias"
        raise UserError(
            f"{layout.name} has {wants}; the head of '{stream}' has {has}{bias}", do="it cannot be exported"
        )


def _scales(model: AlignModel, layout: Layout, media: str, text: str) -> dict[str, Tensor]:
    """Names of the layout's scales and bias -> values of the model's pair."""
    names = [f"{media}:{text}", f"{text}:{media}"]
    pair = next((n for n in names if n in model.logit_scale), None)
    if pair is None:
        raise UserError(f"'{media}' and '{text}' were never paired", do="export streams that an objective aligned")
    out = {s: model.logit_scale[n if n in model.logit_scale else pair] for s, n in zip(layout.scales, names)}
    if layout.biased:
        return out | {"logit_bias": model.logit_bias[pair]}
    if float(model.logit_bias[pair]):
        bias = float(model.logit_bias[pair])
        raise UserError(f"{layout.name} has no logit_bias; pair '{pair}' has {bias:g}", do="train it with infonce")
    return out
