"""Views, mixes and the decoding loop: greedy, sampling and contrastive decoding as rows of one batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmllm.decode.parse import parse_spec
from mmllm.decode.requests import Request, Result
from mmllm.decode.spec import DecodeSpec, View

if TYPE_CHECKING:
    from mmllm.decode.engine import Decoder

__all__ = ["DecodeSpec", "Decoder", "Request", "Result", "View", "parse_spec"]


def __getattr__(name: str):
    # The engine imports torch; the specs must stay importable without it, so that a mistyped method fails at once.
    if name == "Decoder":
        from mmllm.decode.engine import Decoder

        return Decoder
    raise AttributeError(f"module 'mmllm.decode' has no attribute '{name}'")
