"""A multimodal LLM on torch's meta device: all shapes, no weights, from config.json files alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mmllm.connectors import build_injector
from mmllm.contracts import Tower
from mmllm.errors import UserError
from mmllm.model.config import MMLLMConfig
from mmllm.model.injection import decoder_layers
from mmllm.model.loading import _connector
from mmllm.model.modeling import MMLLMForConditionalGeneration
from mmllm.towers import load_tower
from mmllm.towers.factory import HF, OWN, SETTINGS
from mmllm.towers.hf import encoder_config
from mmllm.towers.training import apply_train


def meta_llm(llm: str, dtype: torch.dtype) -> Any:
    """The causal LM of a folder's (or hub id's) config.json, without weights.

    Raises:
        UserError: no config of a causal LM there.
    """
    try:
        config = AutoConfig.from_pretrained(llm)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype)
    except (OSError, ValueError, KeyError) as e:
        what = f"no config of an LLM ({str(e).splitlines()[0]})"
        raise UserError(what, llm, "give a folder with the LLM's config.json") from None


def meta_tower(spec: dict[str, Any], modality: str) -> Tower:
    """A tower without weights; those of transformers need their config.json alone.

    Raises:
        UserError: no such tower.
    """
    settings = dict(spec)
    name = str(settings.pop("model", ""))
    file = Path(name) / "config.json"
    kind = json.loads(file.read_text(encoding="utf-8")).get("model_type") if file.is_file() else None
    if name.startswith(("tiny:", "timm:")) or kind in OWN:
        return load_tower(spec, modality).to("meta")  # small, or made without weights anyway
    train = settings.pop("train", None)
    if (Path(name) / SETTINGS).is_file():
        saved = json.loads((Path(name) / SETTINGS).read_text(encoding="utf-8"))
        settings = {k: v for k, v in {**saved, **settings}.items() if k not in ("modality", "encoder_only")}
    try:
        config = encoder_config(AutoConfig.from_pretrained(name), modality)
        with torch.device("meta"):
            tower = HF[modality](config.to_dict(), **settings)
    except (OSError, ValueError) as e:
        what = f"no config of a {modality} model ({str(e).splitlines()[0]})"
        raise UserError(what, name, "give a folder with its config.json") from None
    except TypeError as e:
        raise UserError(f"tower '{name}': {e}") from None
    if train is not None:
        apply_train(tower, train)
    return tower.eval()


def meta_model(
    llm: Any, towers: dict[str, Tower | None], connectors: dict[str, Any], injector: dict[str, Any] | None = None
) -> MMLLMForConditionalGeneration:
    """Joins parts on the meta device, as ``build_model`` joins real ones; the placeholder tokens are left out.

    Args:
        towers, connectors: by "vision" and "audio"; a connector's config, a Connector, or None.
    """
    width = llm.get_input_embeddings().weight.shape[1]
    config = MMLLMConfig(text_config=llm.config.to_dict(), tie_word_embeddings=bool(llm.config.tie_word_embeddings))
    with torch.device("meta"):
        model = MMLLMForConditionalGeneration(config, language_model=llm)
        for name, tower in towers.items():
            if tower is not None:
                setattr(model, f"{name}_tower", tower.float())
                setattr(model, f"{name}_connector", _connector(tower, connectors.get(name), width).float().to("meta"))
        if injector:
            layers = len(decoder_layers(llm))
            model.injector = build_injector({**injector, "dim": width, "layers": layers}).float()
    for name in ("vision", "audio"):
        tower, connector = getattr(model, f"{name}_tower"), getattr(model, f"{name}_connector")
        setattr(model.config, f"{name}_config", tower.to_config() if tower is not None else None)
        setattr(model.config, f"{name}_connector", connector.to_config() if connector is not None else None)
    vision = model.vision_connector
    if vision is not None and towers["vision"] is not None:
        grid = getattr(towers["vision"], "grid", None)
        model.config.image_seq_length = vision.num_tokens(grid or towers["vision"].num_tokens())  # type: ignore[operator]
    return model


def meta_folder(folder: str | Path, dtype: torch.dtype) -> MMLLMForConditionalGeneration:
    """The model of an mmllm model folder's config.json, without weights."""
    config = MMLLMConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = MMLLMForConditionalGeneration(config)
    model.language_model.to(dtype)
    return model
