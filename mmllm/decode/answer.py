"""The growing answer of one request: end tokens, stop strings, processors and criteria, streaming."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmllm.decode.prompts import Prompt
from mmllm.decode.requests import Request, Result

Streamer = Callable[[int, str], None]


class Answer:
    """One answer while it is made.

    Args:
        tokenizer: of the model; None gives token ids without text.
        end_ids: tokens that end an answer unless the request names its own.
        number: which of the request's ``n`` answers; its draws come from seed + number.
        streamer: gets (index of the request, piece of text).
    """

    def __init__(
        self,
        prompt: Prompt,
        request: Request,
        tokenizer: Any,
        end_ids: list[int],
        number: int = 0,
        streamer: Streamer | None = None,
    ):
        self.prompt, self.request, self.tokenizer, self.streamer = prompt, request, tokenizer, streamer
        self.end_ids = end_ids if request.eos_token_id is None else list(request.eos_token_id)
        self.number = number
        self.generator = torch.Generator().manual_seed(request.seed + number)
        self.ids: list[int] = []
        self.sent = 0
        self.result = Result("", prompt_tokens=len(prompt.ids), rows_per_token=len(prompt.rows))

    @property
    def plain(self) -> bool:
        """True when the next token is the best one of view 0, whatever mix, masks and temperature would do to it."""
        spec = self.prompt.spec
        mixed = len(self.prompt.rows) > 1 or spec.taps or spec.do_sample or spec.raw_gain <= 0
        return not (mixed or self.request.logits_processor or len(self.ids) < self.request.min_new_tokens)

    def processed(self, scores: Tensor) -> Tensor:
        """Scores [V] after the request's own rules."""
        if len(self.ids) < self.request.min_new_tokens and self.end_ids:
            scores = scores.index_fill(0, torch.tensor(self.end_ids, device=scores.device), float("-inf"))
        if self.request.logits_processor:
            ids = self._all_ids(scores)
            for processor in self.request.logits_processor:
                scores = processor(ids, scores[None])[0]  # type: ignore[arg-type]
        return scores

    def add(self, token: int, scores: Tensor) -> bool:
        """Takes a token that was picked from ``scores`` [V]; True when the answer has ended."""
        if token in self.end_ids:
            self.result.end_token_id = token
            return self._finish("stop", self._text())
        self.ids.append(token)
        full = len(self.ids) >= self.request.max_new_tokens
        if self.request.stopping_criteria:
            ids = self._all_ids(scores)
            if any(bool(c(ids, scores[None]).all()) for c in self.request.stopping_criteria):  # type: ignore[arg-type]
                return self._finish("stop", self._text())
        if self.request.stop or self.streamer or full:
            text = self._text()
            cuts = [at for stop in self.request.stop if (at := text.find(stop)) >= 0]
            if cuts:
                return self._finish("stop", text[: min(cuts)])
            if full:
                return self._finish("length", text)
            self._send(text[: self._settled(text)].rstrip())
        return False

    def _all_ids(self, like: Tensor) -> Tensor:
        return torch.tensor([[*self.prompt.ids, *self.ids]], device=like.device)

    def _text(self) -> str:
        return self.tokenizer.decode(self.ids, skip_special_tokens=True).lstrip() if self.tokenizer else ""

    def _settled(self, text: str) -> int:
        """How much of the text no later token can change: not a half character, nor the beginning of a stop string."""
        end = len(text.rstrip("\ufffd"))
        for stop in self.request.stop:
            for n in range(min(len(stop) - 1, end), 0, -1):
                if text[:end].endswith(stop[:n]):
                    end -= n
                    break
        return end

    def _send(self, text: str) -> None:
        if self.streamer and len(text) > self.sent:
            self.streamer(self.prompt.index, text[self.sent :])
            self.sent = len(text)

    def _finish(self, reason: str, text: str) -> bool:
        text = text.rstrip()
        self._send(text)
        self.result.text, self.result.token_ids, self.result.finish_reason = text, self.ids, reason
        return True
