"""Connectors carry tower features into the LLM's input-embedding space; here they are built and loaded."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import torch

from mmllm.connectors.adaptive import AdaptivePoolConnector
from mmllm.connectors.base import FolderConnector
from mmllm.connectors.c_abstractor import CAbstractorConnector
from mmllm.connectors.grid import GridMLPConnector
from mmllm.connectors.injector import GatedInjector
from mmllm.connectors.perceiver import PerceiverConnector
from mmllm.connectors.pixel_shuffle import PixelShuffleConnector
from mmllm.connectors.qformer import QFormerConnector
from mmllm.connectors.sequence import SequenceConnector
from mmllm.connectors.simple import AvgPoolConnector, LinearConnector, MLPConnector
from mmllm.connectors.token_merge import TokenMergeConnector
from mmllm.contracts import Connector, Injector
from mmllm.errors import UserError, unknown
from mmllm.registry import get

__all__ = [
    "AdaptivePoolConnector",
    "AvgPoolConnector",
    "CAbstractorConnector",
    "Connector",
    "FolderConnector",
    "GatedInjector",
    "GridMLPConnector",
    "Injector",
    "LinearConnector",
    "MLPConnector",
    "PerceiverConnector",
    "PixelShuffleConnector",
    "QFormerConnector",
    "SequenceConnector",
    "TokenMergeConnector",
    "build_connector",
    "build_injector",
    "load_connector_folder",
]


def build_connector(config: dict[str, Any]) -> Connector:
    """Makes a connector with fresh weights.

    Args:
        config: ``{"type": "linear" | "mlp" | "grid_mlp" | "perceiver" | ..., "in_dim", "out_dim", ...}``;
            the other keys are the arguments of that connector's class.

    Raises:
        UserError: unknown type, unknown or missing key, an impossible value.
    """
    return _build("connector", config, "mlp")


def build_injector(config: dict[str, Any]) -> Injector:
    """Makes an injector with fresh weights, from ``{"type": "gated_cross_attention", "dim", "layers", ...}``.

    Raises:
        UserError: unknown type, unknown or missing key, an impossible value.
    """
    return _build("injector", config, "gated_cross_attention")


def _build(what: str, config: dict[str, Any], example: str) -> Any:
    settings = dict(config)
    if "type" not in settings:
        raise UserError("missing key 'type'", what, f"for instance type: {example}")
    kind = settings.pop("type")
    cls = get(what, kind)
    valid = list(inspect.signature(cls).parameters)
    for key in settings:
        if key not in valid:
            raise unknown(f"{what} key", key, ["type", *valid], f"{what} '{kind}'")
    for key, p in inspect.signature(cls).parameters.items():
        if p.default is inspect.Parameter.empty and key not in settings:
            raise UserError(f"missing key '{key}'", f"{what} '{kind}'")
    return cls(**settings)


def load_connector_folder(folder: str | Path, **changes: Any) -> Connector:
    """Loads what ``save_pretrained`` wrote (``config.json`` + ``model.safetensors``).

    Args:
        changes: config keys to change on loading, such as ``positions=True`` for a connector that was aligned without
            them. Parameters that only the changed connector has keep their fresh values, position vectors are zero, so
            that they change nothing before training; every saved one must fit.

    Raises:
        UserError: the folder holds no connector, or its weights don't fit the changed config.
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    config_file, weights_file = folder / "config.json", folder / "model.safetensors"
    if not config_file.is_file() or not weights_file.is_file():
        raise UserError("no connector here (config.json and model.safetensors)", folder, "give a connector folder")
    saved = json.loads(config_file.read_text(encoding="utf-8"))
    connector = build_connector({**saved, **changes})
    weights = load_file(str(weights_file))
    here = connector.state_dict()
    for name, tensor in weights.items():
        if name not in here or here[name].shape != tensor.shape:
            raise UserError(
                f"weight '{name}' {list(tensor.shape)} does not fit the connector",
                folder,
                f"keep the saved settings ({', '.join(f'{k}={v}' for k, v in saved.items())})",
            )
    fresh = set(here) - set(weights)
    if fresh and not changes:
        raise UserError(f"weights missing: {', '.join(sorted(fresh))}", folder, "the folder is incomplete")
    with torch.no_grad():
        for name in fresh:
            if name.startswith("positions."):
                here[name].zero_()
        connector.load_state_dict(weights, strict=False)
    return connector
