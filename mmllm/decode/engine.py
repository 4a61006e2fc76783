"""The decoder: runs all views of all requests as rows of one batch and mixes their logits into tokens or scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from mmllm.decode.mix import log_probabilities, pick, scores
from mmllm.decode.prefill import Rows, Tree, batches, build_trees, gather_rows, plain_rows, prefill
from mmllm.decode.prompts import Prompt, PromptEncoder
from mmllm.decode.requests import Request, Result
from mmllm.errors import UserError

Streamer = Callable[[int, str], None]


class Decoder:
    """Generates and scores answers with a multimodal LLM.

    Args:
        model: a transformers causal or image-text-to-text model.
        processor: its processor (``apply_chat_template``, ``tokenizer``).
        max_rows: most rows (requests times views) that decode together.
        token_budget: most tokens of one prefill forward.
        share_prefix: compute a prompt prefix with the same media once for all requests that have it.
    """

    def __init__(
        self, model: Any, processor: Any, max_rows: int = 64, token_budget: int = 2048, share_prefix: bool = True
    ):
        self.model, self.processor = model.eval(), processor
        self.encoder = PromptEncoder(model, processor)
        self.max_rows, self.token_budget = max_rows, token_budget
        self.full_attention = _full_attention(model)
        self.share_prefix = share_prefix and self.full_attention
        self.end_ids = _end_ids(model, self.encoder.tokenizer)
        self.end_of_answer = _end_of_answer(self.encoder, self.end_ids)

    def generate(self, requests: Sequence[Request], streamer: Streamer | None = None) -> list[Result]:
        """Answers in the order of the requests; ``streamer(index, piece)`` gets each piece of text as it is made.

        The pieces of one request joined are its ``Result.text``.
        """
        prompts = [self.encoder.prompt(i, request) for i, request in enumerate(requests)]
        results: list[Result | None] = [None] * len(prompts)
        for chunk in self._chunks(build_trees(prompts, None, self.share_prefix, self.max_rows)):
            rows = self._start(chunk)
            for index, result in self._decode(rows, requests, streamer):
                results[index] = result
        return [result for result in results if result is not None]

    def score(
        self, requests: Sequence[Request], candidates: Sequence[Sequence[str]], end: bool = False
    ) -> list[list[float]]:
        """Log-probability of each candidate answer after the mix, from one prefill.

        Args:
            candidates: for each request, the answers to score.
            end: add the log-probability that the answer ends there.

        Returns:
            For each request one figure per candidate, in nats. Tokens outside the method's plausibility mask lose
            ``mmllm.decode.mix.IMPLAUSIBLE`` nats each, so figures stay finite and ordered.
        """
        if len(requests) != len(candidates):
            raise ValueError(f"{len(requests)} requests but {len(candidates)} lists of candidates")
        tokens = {i: [self._candidate(text, end) for text in texts] for i, texts in enumerate(candidates)}
        prompts = [self.encoder.prompt(i, request) for i, request in enumerate(requests) if tokens[i]]
        found: dict[tuple[int, tuple[int, ...]], float] = {}
        for batch in batches(build_trees(prompts, tokens, self.share_prefix, self.max_rows), self.token_budget):
            part = prefill(self.model, self.encoder, batch, use_cache=False)
            for t, tree in enumerate(batch):
                self._score_tree(tree, partial(part.at, t), found)
        return [[found[i, tuple(wanted)] for wanted in tokens[i]] for i in range(len(requests))]

    @staticmethod
    def _score_tree(tree: Tree, logits_at: Callable[[list[int]], torch.Tensor], found: dict) -> None:
        """Adds the figures of a tree's candidates under (request, candidate tokens)."""
        places = sorted({p for ends in tree.ends for candidate in ends for p in candidate})
        row_of = {place: i for i, place in enumerate(places)}
        table = log_probabilities(logits_at(places), tree.prompts[0].spec).cpu()  # [places, V]
        for prompt, answers, ends in zip(tree.prompts, tree.answers, tree.ends):
            for answer, at in zip(answers, ends):
                total = sum(float(table[row_of[place], token]) for place, token in zip(at, answer))
                found[prompt.index, tuple(answer)] = total

    def _candidate(self, text: str, end: bool) -> list[int]:
        ids = list(self.encoder.tokenizer(text, add_special_tokens=False)["input_ids"])
        if not ids:
            raise UserError("an empty answer cannot be scored")
        return ids + [self.end_of_answer] if end else ids

    def _chunks(self, trees: list[Tree]) -> list[list[Tree]]:
        """Trees that decode together, at most ``max_rows`` rows."""
        chunks: list[list[Tree]] = [[]]
        rows = 0
        for tree in trees:
            own = tree.rows * len(tree.prompts)
            if chunks[-1] and rows + own > self.max_rows:
                chunks.append([])
                rows = 0
            chunks[-1].append(tree)
            rows += own
        return [chunk for chunk in chunks if chunk]

    def _start(self, chunk: list[Tree]) -> Rows:
        if not self.full_attention:
            return plain_rows(prefill(self.model, self.encoder, chunk, use_cache=True))
        parts = [prefill(self.model, self.encoder, b, use_cache=True) for b in batches(chunk, self.token_budget)]
        return gather_rows(parts)

    @torch.inference_mode()
    def _decode(self, rows: Rows, requests: Sequence[Request], streamer: Streamer | None):
        """Steps all rows of a chunk until each request has ended; yields (index, Result)."""
        device = self.model.device
        logits, cache = rows.logits, rows.cache
        mask = rows.mask.to(device)
        active = [_Answer(self, prompt, requests[prompt.index], streamer) for prompt in rows.prompts]
        while True:
            specs = [answer.prompt.spec for answer in active]
            if logits.shape[1] == 1 and not any(spec.do_sample for spec in specs):
                tokens = logits[:, 0].argmax(-1)  # one view: mix, mask and temperature do not change the best token
            else:
                tokens = pick(scores(logits, specs), specs, [answer.generator for answer in active])
            going, ended = [], []
            for answer, token in zip(active, tokens.tolist()):
                (ended if answer.add(token) else going).append(answer)
            for answer in ended:
                yield answer.prompt.index, answer.result
            if not going:
                return
            if ended:
                alive = {id(answer) for answer in going}
                keep = [id(a) in alive for a in active for _ in a.prompt.views]
                index = torch.tensor(keep, device=device).nonzero()[:, 0]
                cache.batch_select_indices(index)
                mask = mask[index]
            active = going
            views = torch.tensor([len(answer.prompt.views) for answer in active], device=device)
            last = torch.tensor([answer.ids[-1] for answer in active], device=device).repeat_interleave(views)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            out = self.model(
                input_ids=last[:, None],
                attention_mask=mask,
                position_ids=mask.sum(-1, keepdim=True) - 1,
                past_key_values=cache,
                use_cache=True,
            )
            logits = _by_answer(out.logits[:, -1], views)


class _Answer:
    """The growing answer of one request: end tokens, stop strings, streaming."""

    def __init__(self, decoder: Decoder, prompt: Prompt, request: Request, streamer: Streamer | None):
        self.decoder, self.prompt, self.request, self.streamer = decoder, prompt, request, streamer
        self.generator = torch.Generator().manual_seed(request.seed)
        self.ids: list[int] = []
        self.sent = 0
        self.result = Result("", prompt_tokens=len(prompt.ids))

    def add(self, token: int) -> bool:
        """Takes a token; True when the answer has ended."""
        if token in self.decoder.end_ids:
            return self._finish("stop", self._text())
        self.ids.append(token)
        full = len(self.ids) >= self.request.max_new_tokens
        if self.request.stop or self.streamer or full:
            text = self._text()
            cuts = [at for stop in self.request.stop if (at := text.find(stop)) >= 0]
            if cuts:
                return self._finish("stop", text[: min(cuts)])
            if full:
                return self._finish("length", text)
            self._send(text[: self._settled(text)].rstrip())
        return False

    def _text(self) -> str:
        return self.decoder.encoder.tokenizer.decode(self.ids, skip_special_tokens=True).lstrip()

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


def _by_answer(logits: torch.Tensor, views: torch.Tensor) -> torch.Tensor:
    """[R, V] with views next to each other -> [n, max K, V]; missing views repeat view 0 and carry no weight."""
    most = int(views.max())
    if len(views) * most == len(logits):
        return logits.view(len(views), most, -1)
    first = views.cumsum(0) - views
    step = torch.arange(most, device=logits.device)
    return logits[first[:, None] + torch.where(step < views[:, None], step, 0)]


def _full_attention(model: Any) -> bool:
    """True when every layer attends to all tokens before it, so that branches can share a prefix."""
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return all(kind == "full_attention" for kind in kinds)
    return not getattr(config, "sliding_window", None) and "mamba" not in config.model_type


def _end_of_answer(encoder: PromptEncoder, end_ids: list[int]) -> int:
    """The token that closes an answer in the chat template, else the first end token."""
    mark = "ANSWERMARK"
    text = encoder.processor.apply_chat_template(
        [{"role": "user", "content": "q"}, {"role": "assistant", "content": mark}], tokenize=False
    )
    closing = encoder.tokenizer(text.rsplit(mark, 1)[-1], add_special_tokens=False)["input_ids"]
    return closing[0] if closing and closing[0] in end_ids else end_ids[0]


def _end_ids(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end an answer, the tokenizer's own first."""
    found: list[int] = []
    generation = getattr(model, "generation_config", None)
    for value in (tokenizer.eos_token_id, getattr(generation, "eos_token_id", None)):
        for token in value if isinstance(value, (list, tuple)) else [value]:
            if token is not None and token not in found:
                found.append(int(token))
    return found
