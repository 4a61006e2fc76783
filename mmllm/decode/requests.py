"""What goes into the decoder and what comes out: one request, one result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mmllm.decode.parse import parse_spec
from mmllm.decode.spec import DecodeSpec

if TYPE_CHECKING:
    from transformers import LogitsProcessor, StoppingCriteria


@dataclass
class Request:
    """One answer to be generated or scored.

    Attributes:
        messages: chat messages, ``[{"role", "content"}]``; content is a string or a list of parts
            ``{"type": "text", "text": str}``, ``{"type": "image", "image": PIL image | path}`` and
            ``{"type": "audio", "audio": float array at the model's rate | path}``; a key ``path`` will do as well.
        decode: a DecodeSpec, or its string or object form, such as ``"vcd:alpha=1"``.
        max_new_tokens: most tokens to generate; ``score`` ignores it.
        min_new_tokens: end tokens are forbidden before.
        n: how many answers; they differ when the method samples. Answer i draws from seed + i.
        seed: seeds sampling and the noise of the views, so a result never depends on its neighbours in the batch.
        stop: strings that end the answer; they are not part of the text.
        eos_token_id: tokens that end the answer; None: the model's own.
        logits_processor: processors of transformers, called with ids [1, L] (prompt and answer) and the mixed and
            masked scores [1, V], before temperature.
        stopping_criteria: criteria of transformers, called with the same ids and scores after each token.
    """

    messages: list[dict[str, Any]]
    decode: DecodeSpec | str | Mapping[str, Any] = "greedy"
    max_new_tokens: int = 64
    seed: int = 0
    stop: tuple[str, ...] = ()
    min_new_tokens: int = 0
    n: int = 1
    eos_token_id: tuple[int, ...] | None = None
    logits_processor: Sequence[LogitsProcessor] = ()
    stopping_criteria: Sequence[StoppingCriteria] = ()

    def __post_init__(self) -> None:
        self.spec: DecodeSpec = parse_spec(self.decode)


@dataclass
class Result:
    """One generated answer.

    Attributes:
        text: the answer without end tokens and stop strings, stripped.
        token_ids: the generated tokens without the end token.
        finish_reason: ``"stop"`` (end token, stop string or criterion) or ``"length"``.
        end_token_id: the token that ended the answer, if one did.
        prompt_tokens: tokens of the prompt, media tokens included.
        rows_per_token: rows of the batch that each token took.
        alternatives: the further answers of a request with ``n`` above 1.
    """

    text: str
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = "length"
    end_token_id: int | None = None
    prompt_tokens: int = 0
    rows_per_token: int = 1
    alternatives: list[Result] = field(default_factory=list)
