"""What goes into the decoder and what comes out: one request, one result."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mmllm.decode.spec import DecodeSpec, parse_spec


@dataclass
class Request:
    """One answer to be generated or scored.

    Attributes:
        messages: chat messages, ``[{"role", "content"}]``; content is a string or a list of parts
            ``{"type": "text", "text": str}``, ``{"type": "image", "image": PIL image | path}`` and
            ``{"type": "audio", "audio": float array at the model's rate | path}``; a key ``path`` will do as well.
        decode: a DecodeSpec or its string form, such as ``"vcd:alpha=1"``.
        max_new_tokens: most tokens to generate; ``score`` ignores it.
        seed: seeds sampling and the noise of the views, so a result never depends on its neighbours in the batch.
        stop: strings that end the answer; they are not part of the text.
    """

    messages: list[dict[str, Any]]
    decode: DecodeSpec | str = "greedy"
    max_new_tokens: int = 64
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.spec: DecodeSpec = parse_spec(self.decode)


@dataclass
class Result:
    """One generated answer.

    Attributes:
        text: the answer without end tokens and stop strings, stripped.
        token_ids: the generated tokens without the end token.
        finish_reason: ``"stop"`` (end token or stop string) or ``"length"``.
        prompt_tokens: tokens of the prompt, media tokens included.
    """

    text: str
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = "length"
    prompt_tokens: int = 0
