"""What towers made of transformers' encoders share: which class a config asks for, loading, saving, taps."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import MODEL_MAPPING, AutoConfig, AutoModel, PreTrainedConfig

from mmllm.blocks.transformer import tapped
from mmllm.contracts import Tower
from mmllm.errors import UserError, unknown

log = logging.getLogger(__name__)
PARTS = {"vision": "vision_config", "text": "text_config", "audio": "audio_config"}
INPUTS = {"vision": ("pixel_values",), "text": ("input_ids",), "audio": ("input_features", "input_values")}


def encoder_config(config: PreTrainedConfig, modality: str) -> PreTrainedConfig:
    """The part of a two-tower model's config (CLIP, SigLIP, CLAP) that describes one modality; others stay whole."""
    return getattr(config, PARTS[modality], None) or config


def encoder_of(model: Any) -> Any:
    """The encoder of an encoder-decoder model (Whisper, T5); any other model as it is."""
    # Not by config.is_encoder_decoder: T5's encoder alone is published with T5's config and "false".
    both = hasattr(model, "encoder") and hasattr(model, "decoder")
    return model.get_encoder() if both else model


def model_class(config: PreTrainedConfig) -> Any:
    """The bare model for a config: AutoModel's choice, else (the halves of SigLIP and CLAP) the class of that name.

    Raises:
        UserError: transformers has neither.
    """
    if type(config) in MODEL_MAPPING:
        found = MODEL_MAPPING[type(config)]
        return found[0] if isinstance(found, (tuple, list)) else found
    name = type(config).__name__.replace("Config", "Model")
    found = getattr(transformers, name, None)
    if found is None:
        raise UserError(f"transformers has no bare model for '{config.model_type}'")
    return found


def encoder_class(config: PreTrainedConfig) -> Any:
    """The class of the encoder inside an encoder-decoder model."""
    with torch.device("meta"):
        return type(encoder_of(AutoModel.from_config(config)))


def load_encoder(path: str, modality: str, encoder_only: bool = False) -> tuple[Any, PreTrainedConfig, set[str]]:
    """The encoder of one modality in a folder or hub id, its config, and the weights that the folder lacks.

    Raises:
        UserError: nothing loadable there, or no encoder of this modality.
    """
    try:
        whole = AutoConfig.from_pretrained(path)
        config = encoder_config(whole, modality)
        cls = encoder_class(config) if encoder_only else model_class(whole)
        settings = {"config": config} if encoder_only else {}
        model, info = cls.from_pretrained(path, dtype=torch.float32, output_loading_info=True, **settings)
    except ImportError as e:
        raise UserError(f"this model needs another library ({str(e).strip().splitlines()[0]})", path) from None
    except (OSError, ValueError) as e:
        raise UserError(f"cannot load a {modality} model: {str(e).splitlines()[0]}", path) from None
    missing = set(info["missing_keys"])
    if config is not whole and not encoder_only:
        part = f"{modality}_model"
        model = getattr(model, part, None)
        if model is None:
            raise UserError(f"the {modality} part of a '{whole.model_type}' model cannot be taken out", path)
        missing = {k for k in missing if k.startswith(f"{part}.")}
    if encoder_of(model) is not model:
        missing = {k for k in missing if not k.startswith("decoder.")}
    # Stand in for masked inputs in pretraining; models fine-tuned since are often published without.
    missing = {k for k in missing if k.rsplit(".", 1)[-1] not in ("masked_spec_embed", "mask_token")}
    model = encoder_of(model).eval()
    if model.main_input_name not in INPUTS[modality]:
        raise UserError(f"a '{config.model_type}' takes {model.main_input_name}: it is no {modality} model", path)
    return model, config, missing


class HFTower(Tower):
    """Common part: holds ``model``, builds it from a config dict, loads and saves it as a Hugging Face folder.

    Args:
        config: the model's own config as a dict (with ``model_type``).
        layer: which hidden state gives the tokens; -1 is the last output of the model, final norm included.
        pooling: how ``pooled`` is made, see the subclasses; ``auto`` picks by the kind of model.
    """

    POOLINGS: tuple[str, ...] = ("auto", "pooler", "mean")
    # What `pooled` was before there was a choice; folders from then must give the numbers their heads were trained on.
    OLD_POOLING = "mean"
    WITHOUT_POOLER = "mean"

    def __init__(
        self,
        config: dict[str, Any],
        layer: int = -1,
        pooling: str = "auto",
        model: nn.Module | None = None,
        source: str | None = None,
    ):
        super().__init__()
        if pooling not in self.POOLINGS:
            raise unknown("pooling", pooling, self.POOLINGS)
        fields = {k: v for k, v in config.items() if k not in ("model_type", "transformers_version")}
        self.config = AutoConfig.for_model(config["model_type"], **fields)
        self.layer, self.source = layer, source
        self.pooling = self.default_pooling() if pooling == "auto" else pooling
        # The whole class tree is kept for encoder-decoder models only as long as it takes to pick the encoder.
        self.model: Any = encoder_of(model_class(self.config)._from_config(self.config)) if model is None else model
        self._preprocessor: Any = None
        if self.pooling not in ("auto", "pooler"):
            self._drop_pooler()

    def _drop_pooler(self) -> None:
        """Takes an unused pooler away: parameters that never get a gradient stop distributed training."""
        optional = "add_pooling_layer" in inspect.signature(type(self.model).__init__).parameters
        if optional and getattr(self.model, "pooler", None) is not None:
            self.model.pooler = None

    @property
    def hidden_size(self) -> int:  # type: ignore[override]
        c = self.config
        return int(getattr(c, "hidden_size", 0) or getattr(c, "d_model", 0) or c.hidden_sizes[-1])

    def default_pooling(self) -> str:
        """What ``auto`` means for this model."""
        return "auto"

    @classmethod
    def from_folder(cls, path: str, encoder_only: bool = False, **settings: Any) -> HFTower:
        """Loads weights from a local folder or hub id.

        Args:
            encoder_only: the folder holds just the encoder of an encoder-decoder model, as ``save_tower`` writes it.

        Raises:
            UserError: nothing loadable there, or weights are missing. Without those of a pooler, ``auto`` pools by the
                class token or the mean, and says so.
        """
        model, config, missing = load_encoder(path, cls.modality, encoder_only)
        tower = cls(config.to_dict(), model=model, source=path, **settings)
        poolers = {k for k in missing if "pooler" in k.split(".")}
        lost = missing if settings.get("pooling") == "pooler" else missing - poolers
        if lost:
            raise UserError(f"{len(lost)} weights of the {cls.modality} model are missing: {sorted(lost)[0]}", path)
        if poolers and tower.pooling in ("auto", "pooler"):
            log.warning("%s has no weights for its pooler: pooling by '%s' instead", path, cls.WITHOUT_POOLER)
            tower.pooling = cls.WITHOUT_POOLER
            tower._drop_pooler()
        return tower

    def run(self, inputs: dict[str, Any], layers: Sequence[int] = ()) -> tuple[Tensor, Any, dict[int, Tensor] | None]:
        """Tokens of the chosen layer, the model's whole output, and the asked hidden states."""
        out = self.model(**inputs, output_hidden_states=self.layer != -1 or bool(layers))
        tokens = out.last_hidden_state if self.layer == -1 else out.hidden_states[self.layer]
        return tokens, out, tapped(out.hidden_states, layers) if layers else None

    def gradient_checkpointing_enable(self) -> None:
        """The model's layers keep no activations in training; the backward makes them again."""
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def pooler_output(self, out: Any) -> Tensor:
        """The model's own pooled output.

        Raises:
            UserError: it has none.
        """
        pooled = getattr(out, "pooler_output", None)
        if pooled is None:
            valid = ", ".join(p for p in self.POOLINGS if p not in ("auto", "pooler"))
            raise UserError(f"'{self.config.model_type}' has no pooled output of its own", "pooling", f"choose {valid}")
        return pooled

    def to_config(self) -> dict[str, Any]:
        own = {"layer": self.layer, "pooling": self.pooling}
        return {"model_type": "hf", "modality": self.modality, **own, "config": self.config.to_dict()}

    def settings(self) -> dict[str, Any]:
        """What a Hugging Face folder's config.json does not say about this tower."""
        config = self.to_config()
        return {k: v for k, v in config.items() if k not in ("model_type", "modality", "config")}

    def save_pretrained(self, folder: str | Path) -> None:
        """Model, and the preprocessor where there is one."""
        self.model.save_pretrained(folder)
        self.save_preprocessor(folder)

    def save_preprocessor(self, folder: str | Path) -> None:
        """Writes the preprocessor; a tower whose source has none is saved without."""
        try:
            made = self.preprocessor()
        except UserError as e:
            log.warning("saved without a preprocessor: %s", e)
            return
        made.save_pretrained(folder)

    def preprocessor(self) -> Any:
        if self._preprocessor is None:
            if self.source is None:
                what = f"this {self.modality} tower has no preprocessor"
                raise UserError(what, do="load a folder that has one, or give it one with use_preprocessor")
            self._preprocessor = self.load_preprocessor(self.source)
        return self._preprocessor

    def use_preprocessor(self, preprocessor: Any) -> None:
        """Gives the tower a preprocessor of the caller's making."""
        self._preprocessor = preprocessor

    def load_preprocessor(self, source: str) -> Any:
        """The preprocessor in the folder or hub id ``source``."""
        raise NotImplementedError
