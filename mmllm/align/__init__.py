"""The contrastive stage: AlignModel, its objectives, its folder, and models of other libraries in and out."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmllm.align.folder import load_align, load_connector, save_align
    from mmllm.align.interop import export_align, import_align
    from mmllm.align.model import AlignModel
    from mmllm.align.open_clip import import_open_clip

__all__ = [
    "AlignModel",
    "export_align",
    "import_align",
    "import_open_clip",
    "load_align",
    "load_connector",
    "save_align",
]
HOME = {"AlignModel": "model", "export_align": "interop", "import_align": "interop", "import_open_clip": "open_clip"}


def __getattr__(name: str) -> Any:
    """Imports torch only when something of it is used."""
    if name in __all__:
        return getattr(importlib.import_module(f"mmllm.align.{HOME.get(name, 'folder')}"), name)
    raise AttributeError(name)
