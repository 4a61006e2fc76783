"""Makes towers: from a folder or name with weights, or from a config dict alone; and saves them as folders."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoFeatureExtractor, AutoImageProcessor

from mmllm.contracts import Tower
from mmllm.errors import UserError, unknown
from mmllm.towers.audio_features import MMLLMAudioFeatureExtractor
from mmllm.towers.efficientnet import EfficientNetLite0Tower
from mmllm.towers.hf import HFAudioTower, HFTextTower, HFVisionTower
from mmllm.towers.image_processing import MMLLMImageProcessor
from mmllm.towers.tiny import TinyAudioTower, TinyViTTower
from mmllm.towers.word_embeddings import WordEmbeddingTower

OWN: dict[str, type[Tower]] = {
    "efficientnet_lite0": EfficientNetLite0Tower,
    "tiny_vit": TinyViTTower,
    "tiny_audio": TinyAudioTower,
    "word_embeddings": WordEmbeddingTower,
}
HF: dict[str, type[Tower]] = {"vision": HFVisionTower, "audio": HFAudioTower, "text": HFTextTower}
TINY = {"tiny:vit": TinyViTTower, "tiny:audio": TinyAudioTower}
SETTINGS = "tower.json"  # what a Hugging Face folder's own config.json does not say: modality, layer


def build_tower(config: dict[str, Any]) -> Tower:
    """The architecture described by ``Tower.to_config()``, with fresh weights.

    Raises:
        UserError: unknown ``model_type`` or a key that this tower does not take.
    """
    fields = {k: v for k, v in config.items() if k not in ("model_type", "modality")}
    kind = config.get("model_type", "")
    if kind == "hf":
        cls = HF[config["modality"]]
    elif kind in OWN:
        cls = OWN[kind]
    else:
        raise unknown("tower", kind, [*OWN, "hf"])
    try:
        return cls(**fields)
    except TypeError as e:
        raise UserError(f"tower '{kind}': {e}") from None


def load_tower(spec: str | dict[str, Any], modality: str) -> Tower:
    """A tower with weights, in eval mode.

    Args:
        spec: a local folder or hub id; ``tiny:vit`` or ``tiny:audio`` (fresh weights); or a dict with ``model`` (one of
            these) and settings, such as ``{"model": "tiny:vit", "image_size": 32}`` or
            ``{"model": "openai/whisper-tiny", "layer": -2}``; ``{"type": "word_embeddings", "model": LLM}``.
        modality: ``vision``, ``audio`` or ``text``.

    Raises:
        UserError: nothing loadable, or a tower of another modality.
    """
    settings = {"model": spec} if isinstance(spec, str) else dict(spec)
    if "model" not in settings:
        raise UserError("a tower needs 'model'", do="a folder, a hub id, tiny:vit or tiny:audio")
    model, kind = str(settings.pop("model")), settings.pop("type", None)
    if modality not in HF:
        raise unknown("modality", modality, HF)
    try:
        tower = _load(model, kind, modality, settings)
    except TypeError as e:
        raise UserError(f"tower '{model}': {e}") from None
    if tower.modality != modality:
        raise UserError(f"'{model}' is a {tower.modality} tower, not {modality}")
    return tower.eval()


def _load(model: str, kind: str | None, modality: str, settings: dict[str, Any]) -> Tower:
    if kind == "word_embeddings":
        return WordEmbeddingTower.from_folder(model, **settings)
    if model.startswith("tiny:"):
        if model not in TINY:
            raise unknown("tower", model, TINY)
        return TINY[model](**settings)
    folder = Path(model)
    config_file = folder / "config.json"
    if folder.exists() and not config_file.is_file():
        raise UserError("no config.json in this folder", folder, "give a model folder, or the run's final/image")
    config = json.loads(config_file.read_text(encoding="utf-8")) if config_file.is_file() else {}
    if config.get("model_type") not in OWN:
        if (folder / SETTINGS).is_file():
            saved = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
            settings = {"layer": saved["layer"], "encoder_only": saved["encoder_only"], **settings}
        return HF[modality].from_folder(model, **settings)  # type: ignore[attr-defined]
    # A folder may say more about its model (classes, width) than the tower takes.
    known = {"model_type", "modality", *inspect.signature(OWN[config["model_type"]]).parameters}
    tower = build_tower({**{k: v for k, v in config.items() if k in known}, **settings})
    state = load_file(str(folder / "model.safetensors"))
    # The published EfficientNet also carries its ImageNet classifier, which no tower has.
    state = {k: v for k, v in state.items() if not k.startswith("_fc.")}
    missing, unexpected = tower.load_state_dict(state, strict=False)
    if missing or unexpected:
        raise UserError(
            f"weights do not fit: {len(missing)} missing, {len(unexpected)} unexpected", folder / "model.safetensors"
        )
    if isinstance(tower, WordEmbeddingTower):
        tower.source = model
    return tower


def save_tower(tower: Tower, folder: str | Path) -> None:
    """Writes config, weights (safetensors) and preprocessor, so that ``load_tower(folder)`` gives the same tower."""
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    if hasattr(tower, "save_pretrained"):
        tower.save_pretrained(path)  # type: ignore[operator]
    else:
        tower.preprocessor().save_pretrained(path)
    config = tower.to_config()
    if config["model_type"] == "hf":
        encoder_only = bool(config["config"].get("is_encoder_decoder"))
        saved = {"modality": tower.modality, "layer": config["layer"], "encoder_only": encoder_only}
        (path / SETTINGS).write_text(json.dumps(saved), encoding="utf-8")
        return
    state = {k: v.detach().cpu().contiguous() for k, v in tower.state_dict().items()}
    save_file(state, str(path / "model.safetensors"), metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def load_preprocessor(folder: str | Path, modality: str) -> Any:
    """The image processor or feature extractor saved in a folder, ours or one of transformers."""
    file = Path(folder) / "preprocessor_config.json"
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    if "MMLLMImageProcessor" in text:
        return MMLLMImageProcessor.from_pretrained(folder)
    if "MMLLMAudioFeatureExtractor" in text:
        return MMLLMAudioFeatureExtractor.from_pretrained(folder)
    return (AutoImageProcessor if modality == "vision" else AutoFeatureExtractor).from_pretrained(folder)


def image_inputs(processor: Any, images: list[Any]) -> dict[str, Tensor]:
    """Pictures (PIL) -> {"pixel_values": [B, 3, H, W]} by our processor or any of transformers."""
    out = processor(images=images, return_tensors="pt")
    return {"pixel_values": out["pixel_values"]}


def audio_inputs(extractor: Any, waves: list[np.ndarray]) -> dict[str, Tensor]:
    """Waves [T] at the extractor's rate -> ``input_features``, ``feature_attention_mask``, whatever it calls them."""
    own = isinstance(extractor, MMLLMAudioFeatureExtractor)
    extra = (
        {}
        if own
        else {"return_attention_mask": True, "padding": "max_length" if hasattr(extractor, "chunk_length") else True}
    )
    out = extractor(waves, sampling_rate=extractor.sampling_rate, return_tensors="pt", **extra)
    features = out["input_features"] if "input_features" in out else out["input_values"]
    mask = out.get("feature_attention_mask", out.get("attention_mask"))
    if mask is None:
        mask = torch.ones(features.shape[0], features.shape[-1], dtype=torch.long)
    return {"input_features": features, "feature_attention_mask": mask}
