"""The contrastive stage: AlignModel, its objectives, and its folder."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmllm.align.folder import load_align, load_connector, save_align
    from mmllm.align.model import AlignModel

__all__ = ["AlignModel", "load_align", "load_connector", "save_align"]


def __getattr__(name: str) -> Any:
    """Imports torch only when something of it is used."""
    if name == "AlignModel":
        from mmllm.align.model import AlignModel

        return AlignModel
    if name in __all__:
        from mmllm.align import folder

        return getattr(folder, name)
    raise AttributeError(name)
