"""timm's backbones as towers with fresh weights; trained ones load like any model of transformers."""

from __future__ import annotations

import importlib
from typing import Any

from transformers import TimmWrapperConfig

from mmllm.errors import UserError, unknown
from mmllm.towers.hf_vision import HFVisionTower
from mmllm.towers.preprocessing import timm_processor

TIMM = "timm:"


def timm_library() -> Any:
    """The module ``timm``.

    Raises:
        UserError: it is not installed, or its torchvision does not fit this torch.
    """
    try:
        return importlib.import_module("timm")
    except (ImportError, RuntimeError) as e:
        what = f"timm cannot be imported ({str(e).splitlines()[0]})"
        raise UserError(what, do="pip install 'mmllm[timm]', with the torchvision made for this torch") from None


def new_timm_tower(name: str, settings: dict[str, Any]) -> HFVisionTower:
    """The timm architecture ``name`` with fresh weights.

    Args:
        settings: of HFVisionTower; ``model_args`` go to ``timm.create_model``.

    Raises:
        UserError: timm is not there, or has no such model.
    """
    timm = timm_library()
    base = name.split(".")[0]
    if base not in timm.list_models():
        raise unknown("timm model", base, timm.list_models())
    settings = dict(settings)
    arguments = settings.pop("model_args", {})
    about = timm.get_pretrained_cfg(base)
    described = about.to_dict() if about is not None else {}
    if "img_size" in arguments:
        size = arguments["img_size"]
        described["input_size"] = (3, size, size)
    described.pop("num_classes", None)
    config = TimmWrapperConfig(architecture=base, model_args=arguments)
    tower = HFVisionTower({**config.to_dict(), "pretrained_cfg": described}, **settings)
    tower.use_preprocessor(timm_processor(tower.config))
    return tower
