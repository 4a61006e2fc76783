"""Makes towers: from a folder or name with weights, or from a config dict alone; and saves them as folders."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from mmllm.contracts import Tower
from mmllm.errors import UserError, unknown
from mmllm.towers.char_gru import CharGRUTower
from mmllm.towers.efficientnet import EfficientNetLite0Tower
from mmllm.towers.hf import HFTower, model_class
from mmllm.towers.hf_audio import HFAudioTower
from mmllm.towers.hf_text import HFTextTower
from mmllm.towers.hf_vision import HFVisionTower
from mmllm.towers.timm_models import TIMM, new_timm_tower
from mmllm.towers.tiny import TinyAudioTower, TinyViTTower
from mmllm.towers.tiny_sequences import TinyAudioTransformer, TinyTextTower
from mmllm.towers.training import apply_train, merged
from mmllm.towers.video import VideoTower
from mmllm.towers.word_embeddings import WordEmbeddingTower

OWN: dict[str, type[Tower]] = {
    "efficientnet_lite0": EfficientNetLite0Tower,
    "tiny_vit": TinyViTTower,
    "tiny_audio": TinyAudioTower,
    "tiny_audio_transformer": TinyAudioTransformer,
    "tiny_text": TinyTextTower,
    "char_gru": CharGRUTower,
    "word_embeddings": WordEmbeddingTower,
}
HF: dict[str, type[HFTower]] = {"vision": HFVisionTower, "audio": HFAudioTower, "text": HFTextTower}
TINY: dict[str, type[Tower]] = {
    "tiny:vit": TinyViTTower,
    "tiny:audio": TinyAudioTower,
    "tiny:audio_transformer": TinyAudioTransformer,
    "tiny:text": TinyTextTower,
    "tiny:char_gru": CharGRUTower,
}
MODALITIES = (*HF, "video")
SETTINGS = "tower.json"  # what a Hugging Face folder's own config.json does not say: modality, layer, pooling


def build_tower(config: dict[str, Any]) -> Tower:
    """The architecture described by ``Tower.to_config()``, with fresh weights.

    Raises:
        UserError: unknown ``model_type`` or a key that this tower does not take.
    """
    fields = {k: v for k, v in config.items() if k not in ("model_type", "modality")}
    kind = config.get("model_type", "")
    if kind == "video":
        return VideoTower(build_tower(fields.pop("vision")), **fields)
    if kind == "hf":
        cls: type[Tower] = HF[config["modality"]]
    elif kind in OWN:
        cls = OWN[kind]
    else:
        raise unknown("tower", kind, [*OWN, "hf", "video"])
    try:
        return cls(**fields)
    except TypeError as e:
        raise UserError(f"tower '{kind}': {e}") from None


def load_tower(spec: str | dict[str, Any], modality: str) -> Tower:
    """A tower with weights, in eval mode.

    Args:
        spec: a local folder or hub id; ``tiny:vit``, ``tiny:audio``, ``tiny:audio_transformer``, ``tiny:text``,
            ``tiny:char_gru`` or ``timm:NAME`` (fresh weights); or a dict with ``model`` (one of these) and settings,
            such as ``{"model": "tiny:vit", "image_size": 32}`` or ``{"model": "openai/whisper-tiny", "layer": -2}``;
            ``{"type": "word_embeddings", "model": LLM}``. The setting ``train`` says what may train, see
            ``apply_train``.
        modality: ``vision``, ``audio``, ``text``, or ``video``, which takes a picture encoder and ``pooling`` over
            time: ``mean`` or ``attention``.

    Raises:
        UserError: nothing loadable, or a tower of another modality.
    """
    settings = {"model": spec} if isinstance(spec, str) else dict(spec)
    if "model" not in settings:
        raise UserError("a tower needs 'model'", do="a folder, a hub id, tiny:vit, tiny:audio or tiny:text")
    model, kind = str(settings.pop("model")), settings.pop("type", None)
    train = settings.pop("train", None)
    if modality not in MODALITIES:
        raise unknown("modality", modality, MODALITIES)
    try:
        tower = _load(model, kind, modality, settings)
    except TypeError as e:
        raise UserError(f"tower '{model}': {e}") from None
    if tower.modality != modality:
        raise UserError(f"'{model}' is a {tower.modality} tower, not {modality}")
    if train is not None:
        apply_train(tower, train)
    return tower.eval()


def _load(model: str, kind: str | None, modality: str, settings: dict[str, Any]) -> Tower:
    if kind == "word_embeddings":
        return WordEmbeddingTower.from_folder(model, **settings)
    if modality == "video":
        return _load_video(model, settings)
    if model.startswith("tiny:"):
        if model not in TINY:
            raise unknown("tower", model, TINY)
        return TINY[model](**settings)
    if model.startswith(TIMM):
        return new_timm_tower(model.removeprefix(TIMM), settings)
    folder = Path(model)
    config = _config_of(folder)
    if config.get("model_type") not in OWN:
        if (folder / SETTINGS).is_file():
            saved = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
            settings = {"pooling": HF[modality].OLD_POOLING, **saved, **settings}
            del settings["modality"]
        return HF[modality].from_folder(model, **settings)
    # A folder may say more about its model (classes, width) than the tower takes.
    known = {"model_type", "modality", *inspect.signature(OWN[config["model_type"]]).parameters}
    tower = build_tower({**{k: v for k, v in config.items() if k in known}, **settings})
    _load_weights(tower, folder)
    if hasattr(tower, "source"):
        tower.source = model  # type: ignore[assignment]
    return tower


def _load_video(model: str, settings: dict[str, Any]) -> Tower:
    """A saved video tower, or a picture encoder with a fresh pooling over time."""
    folder = Path(model)
    saved = (folder / "config.json").is_file() and _config_of(folder).get("model_type") == "video"
    pooling = settings.pop("pooling", _config_of(folder)["pooling"] if saved else "mean")
    vision = load_tower({"model": str(folder / "vision") if saved else model, **settings}, "vision")
    tower = VideoTower(vision, pooling)
    if saved and tower.score is not None:
        _load_weights(tower.score, folder)
    return tower


def _config_of(folder: Path) -> dict[str, Any]:
    """config.json of a folder; empty for a hub id.

    Raises:
        UserError: a folder without one.
    """
    file = folder / "config.json"
    if folder.exists() and not file.is_file():
        raise UserError("no config.json in this folder", folder, "give a model folder, or the run's final/image")
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _load_weights(module: Any, folder: Path) -> None:
    file = folder / "model.safetensors"
    # The published EfficientNet also carries its ImageNet classifier, which no tower has.
    state = {k: v for k, v in load_file(str(file)).items() if not k.startswith("_fc.")}
    missing, unexpected = module.load_state_dict(state, strict=False)
    if missing or unexpected:
        raise UserError(f"weights do not fit: {len(missing)} missing, {len(unexpected)} unexpected", file)


def save_tower(tower: Tower, folder: str | Path) -> None:
    """Writes config, weights (safetensors) and preprocessor, so that ``load_tower(folder)`` gives the same tower.

    Adapters (LoRA) are merged into the weights.
    """
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    tower = merged(tower)
    config, module = tower.to_config(), tower
    if isinstance(tower, HFTower):
        tower.save_pretrained(path)
        encoder_only = type(tower.model) is not model_class(tower.config)
        saved = {"modality": tower.modality, **tower.settings(), "encoder_only": encoder_only}
        (path / SETTINGS).write_text(json.dumps(saved), encoding="utf-8")
        return
    if isinstance(tower, VideoTower):
        save_tower(tower.vision, path / "vision")
        config = {k: v for k, v in config.items() if k != "vision"}
        module = tower.score
    elif hasattr(tower, "save_pretrained"):
        tower.save_pretrained(path)  # type: ignore[operator]
    else:
        tower.preprocessor().save_pretrained(path)
    state = {k: v.detach().cpu().contiguous() for k, v in module.state_dict().items()} if module is not None else {}
    save_file(state, str(path / "model.safetensors"), metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
