"""The decoder: runs all views of all requests as rows of one batch and mixes their logits into tokens or scores."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch

from mmllm.decode.answer import Answer, Streamer
from mmllm.decode.inside import Captured, Frame, Inside
from mmllm.decode.mix import Taps, log_probabilities, pick, scores
from mmllm.decode.prefill import Answers, Prefilled, batches, build_trees, prefill
from mmllm.decode.prepare import captions, prepare
from mmllm.decode.prompts import Prompt, PromptEncoder
from mmllm.decode.requests import Request, Result
from mmllm.decode.rows import Ends, State, by_view, gathered, plain
from mmllm.decode.trace import Observer, StepTrace
from mmllm.errors import UserError


class Decoder:
    """Generates and scores answers with a multimodal LLM.

    Args:
        model: a transformers causal or image-text-to-text model.
        processor: its processor (``apply_chat_template``, ``tokenizer``); None for ready token ids only (``run``).
        max_rows: most rows (requests times views) that decode together.
        token_budget: most tokens of one prefill forward.
        share_prefix: compute a prompt prefix with the same media once for all requests that have it.

    Attributes:
        forwards: forwards of the model so far, prefills included.
    """

    def __init__(
        self, model: Any, processor: Any, max_rows: int = 64, token_budget: int = 2048, share_prefix: bool = True
    ):
        self.model, self.processor = model.eval(), processor
        self.encoder, self.inside = PromptEncoder(model, processor), Inside(model)
        self.max_rows, self.token_budget = max_rows, token_budget
        self.full_attention = _full_attention(model)
        self.share_prefix = share_prefix and self.full_attention
        self.end_ids = _end_ids(model, self.encoder.tokenizer)
        self.forwards = 0

    def generate(
        self, requests: Sequence[Request], streamer: Streamer | None = None, observer: Observer | None = None
    ) -> list[Result]:
        """Answers in the order of the requests.

        Args:
            streamer: gets (index, piece) for each piece of text as it is made; the pieces of one request joined are
                its ``Result.text``. Of ``n`` answers the first is streamed.
            observer: gets a StepTrace for each token of each request.
        """
        return self.run(self.prompts(requests), requests, streamer, observer)

    def run(
        self,
        prepared: list[Prompt],
        requests: Sequence[Request],
        streamer: Streamer | None = None,
        observer: Observer | None = None,
    ) -> list[Result]:
        """``generate`` from the point where the prompts are made; ``Prompt.index`` is a place in ``requests``."""
        results: list[list[Result | None]] = [[None] * request.n for request in requests]
        for prompts in self._chunks(prepared, requests):
            answers = [
                Answer(p, requests[p.index], self.encoder.tokenizer, self.end_ids, i, None if i else streamer)
                for p in prompts
                for i in range(requests[p.index].n)
            ]
            for answer in self._decode(self._start(prompts, answers), answers, observer):
                results[answer.prompt.index][answer.number] = answer.result
        done = [[result for result in of_one if result is not None] for of_one in results]
        for first, *others in done:
            first.alternatives = others
        return [of_one[0] for of_one in done]

    @torch.inference_mode()
    def score(
        self, requests: Sequence[Request], candidates: Sequence[Sequence[str]], end: bool = False
    ) -> list[list[float]]:
        """Log-probability of each candidate answer after the mix, from one prefill.

        Requests about the same media under different methods share every row that their methods have in common.

        Args:
            candidates: for each request, the answers to score.
            end: add the log-probability that the answer ends there.

        Returns:
            For each request one figure per candidate, in nats. Tokens outside the method's plausibility mask lose
            ``mmllm.decode.mix.IMPLAUSIBLE`` nats each, so figures stay finite and ordered.
        """
        if len(requests) != len(candidates):
            raise ValueError(f"{len(requests)} requests but {len(candidates)} lists of candidates")
        tokens = [[self._candidate(text, end) for text in texts] for texts in candidates]
        found: list[list[float]] = [[] for _ in requests]
        prompts = self.prompts([r for r, wanted in zip(requests, tokens) if wanted])
        for prompt, index in zip(prompts, [i for i, wanted in enumerate(tokens) if wanted]):
            prompt.index = index
        for group in self._portions(prompts):
            answers: Answers = {id(row): tokens[p.index] for p in group for row in p.rows}
            parts = self._prefill(group, answers, use_cache=False)
            ends = Ends(self.inside, parts)
            for prompt in group:
                found[prompt.index] = self._score_one(ends, prompt, tokens[prompt.index])
        return found

    def _score_one(self, ends: Ends, prompt: Prompt, candidates: list[list[int]]) -> list[float]:
        """Sums of log-probabilities of one request's candidates; a place shared by several is mixed once."""
        places: dict[tuple[int, ...], torch.Tensor] = {}
        for answer in candidates:
            if any(tuple(answer[:i]) not in places for i in range(len(answer))):
                z, taps = ends.views(prompt, answer), ends.taps(prompt, answer)
                table = log_probabilities(z, prompt.spec, list(range(len(answer))), taps).cpu()
                places |= {tuple(answer[:i]): table[i] for i in range(len(answer))}
        return [sum(float(places[tuple(a[:i])][token]) for i, token in enumerate(a)) for a in candidates]

    def prompts(self, requests: Sequence[Request]) -> list[Prompt]:
        """Requests made ready: tokens and media of all views, descriptions and directions where a method needs them."""
        described = captions(self, requests) if any(_describes(r) for r in requests) else [None] * len(requests)
        made = [self.encoder.prompt(i, r, text) for i, (r, text) in enumerate(zip(requests, described))]
        prepare(self, made)
        return made

    def _candidate(self, text: str, end: bool) -> list[int]:
        ids = list(self.encoder.tokenizer(text, add_special_tokens=False)["input_ids"])
        if not ids:
            raise UserError("an empty answer cannot be scored")
        return ids + [self.end_of_answer] if end else ids

    @cached_property
    def end_of_answer(self) -> int:
        """The token that closes an answer in the chat template, else the first end token."""
        mark = "ANSWERMARK"
        text = self.processor.apply_chat_template(
            [{"role": "user", "content": "q"}, {"role": "assistant", "content": mark}], tokenize=False
        )
        closing = self.encoder.tokenizer(text.rsplit(mark, 1)[-1], add_special_tokens=False)["input_ids"]
        return closing[0] if closing and closing[0] in self.end_ids else self.end_ids[0]

    def _chunks(self, prompts: list[Prompt], requests: Sequence[Request]) -> Iterator[list[Prompt]]:
        """Prompts that decode together, at most ``max_rows`` rows; those on the same media stay side by side."""
        chunk: list[Prompt] = []
        rows = 0
        for prompt in sorted(prompts, key=lambda p: -len(p.ids)) if not self.share_prefix else _by_media(prompts):
            own = len(prompt.rows) * requests[prompt.index].n
            if chunk and rows + own > self.max_rows:
                yield chunk
                chunk, rows = [], 0
            chunk.append(prompt)
            rows += own
        if chunk:
            yield chunk

    def _portions(self, prompts: list[Prompt]) -> Iterator[list[Prompt]]:
        """Prompts whose logits are held at once: whole groups on the same media, a few forwards' worth of tokens."""
        portion: list[Prompt] = []
        size = 0
        for group in _media_groups(prompts):
            own = _distinct_tokens(group) if self.share_prefix else sum(len(r.ids) for p in group for r in p.rows)
            if portion and size + own > 4 * self.token_budget:
                yield portion
                portion, size = [], 0
            portion += group
            size += own
        if portion:
            yield portion

    def _prefill(self, prompts: list[Prompt], answers: Answers, use_cache: bool) -> list[Prefilled]:
        rows = [row for prompt in prompts for row in prompt.rows]
        taps = list(dict.fromkeys(tap for prompt in prompts for tap in prompt.spec.taps))
        trees = build_trees(rows, answers, self.share_prefix)
        parts = []
        # A model with its own kind of cache keeps it, so all rows must lie in one forward.
        for batch in batches(trees, self.token_budget) if self.full_attention or not use_cache else [trees]:
            self.forwards += 1
            parts.append(
                prefill(self.model, self.encoder, self.inside, batch, use_cache, taps, share=self.share_prefix)
            )
        return parts

    def _start(self, prompts: list[Prompt], answers: list[Answer]) -> State:
        parts = self._prefill(prompts, {}, use_cache=True)
        order = [answer.prompt for answer in answers]
        return gathered(self.inside, order, parts) if self.full_attention else plain(self.inside, order, parts[0])

    @torch.inference_mode()
    def _decode(self, state: State, active: list[Answer], observer: Observer | None) -> Iterator[Answer]:
        """Steps all rows until each answer has ended; yields the answers as they end."""
        device = self.model.device
        cache, mask, media, logits, taps = state.cache, state.mask.to(device), state.media, state.logits, state.taps
        while True:
            specs = [answer.prompt.spec for answer in active]
            if all(answer.plain for answer in active) and observer is None:
                mixed = logits[:, 0]
                tokens = mixed.argmax(-1)
            else:
                mixed = scores(logits, specs, [len(answer.ids) for answer in active], taps)
                mixed = torch.stack([answer.processed(z) for answer, z in zip(active, mixed)])
                tokens = pick(mixed, specs, [answer.generator for answer in active])
            chosen = tokens.tolist()
            if observer is not None:
                for i, (answer, token) in enumerate(zip(active, chosen)):
                    views = logits[i, : len(answer.prompt.view_row)]
                    observer(StepTrace(answer.prompt.index, len(answer.ids), token, views, mixed[i]))
            going, ended = [], []
            for i, (answer, token) in enumerate(zip(active, chosen)):
                (ended if answer.add(token, mixed[i]) else going).append(answer)
            yield from ended
            if not going:
                return
            if ended:
                alive = {id(answer) for answer in going}
                keep = [i for i, a in enumerate(a for a in active for _ in a.prompt.rows) if id(a) in alive]
                index = torch.tensor(keep, device=device)
                cache.batch_select_indices(index)
                mask, media = mask[index], [media[i] for i in keep]
            active = going
            counts = torch.tensor([len(answer.prompt.rows) for answer in active], device=device)
            last = torch.tensor([answer.ids[-1] for answer in active], device=device).repeat_interleave(counts)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            out, captured = self._step(active, last, mask, media, cache)
            logits = by_view(out, [answer.prompt for answer in active])
            taps = self._taps(active, captured)

    def _step(
        self, active: list[Answer], last: torch.Tensor, mask: torch.Tensor, media: list[list[int]], cache: Any
    ) -> tuple[torch.Tensor, Captured]:
        """One forward of one token per row -> logits [R, V] and the captured states [R, H]."""
        self.forwards += 1
        rows = [row for answer in active for row in answer.prompt.rows]
        wanted = list(dict.fromkeys(tap for answer in active for tap in answer.prompt.spec.taps))
        inputs = dict(
            input_ids=last[:, None],
            attention_mask=mask,
            position_ids=mask.sum(-1, keepdim=True) - 1,
            past_key_values=cache,
            use_cache=True,
        )
        if not wanted and not any(row.model for row in rows):
            return self.model(**inputs).logits[:, -1], Captured()
        frame = Frame(rows, media, [[0]] * len(rows), [[]] * len(rows))
        every = torch.arange(len(rows), device=mask.device)
        with self.inside.captured(wanted, every, torch.zeros_like(every)) as captured, self.inside.changed(frame):
            if any(row.model for row in rows):
                dtype = self.model.get_input_embeddings().weight.dtype
                dense = torch.where(mask.bool(), 0.0, torch.finfo(dtype).min).to(dtype)
                inputs["attention_mask"] = dense[:, None, None]
            return self.model(**inputs).logits[:, -1], captured

    def _taps(self, active: list[Answer], captured: Captured) -> list[Taps]:
        """Tap logits of each request's base row."""
        found: list[Taps] = []
        row = 0
        for answer in active:
            at = torch.tensor([row])
            found.append({t: self.inside.tap_logits(t, captured, at)[0] for t in answer.prompt.spec.taps})
            row += len(answer.prompt.rows)
        return found


def _describes(request: Request) -> bool:
    return any(op.name == "caption" for view in request.spec.views for op in view.text)


def _media_groups(prompts: Iterable[Prompt]) -> list[list[Prompt]]:
    """Prompts on the same media together, in the order of their first one."""
    groups: dict[tuple, list[Prompt]] = {}
    for prompt in prompts:
        groups.setdefault(tuple(s.media.key for s in prompt.rows[0].shown), []).append(prompt)
    return list(groups.values())


def _by_media(prompts: list[Prompt]) -> list[Prompt]:
    """The same order flattened, groups with the longest prompts first, so that chunks need little padding."""
    groups = sorted(_media_groups(prompts), key=lambda group: -max(len(p.ids) for p in group))
    return [prompt for group in groups for prompt in group]


def _distinct_tokens(group: list[Prompt]) -> int:
    """Roughly the tokens that a group takes when its prefixes are shared."""
    seen: dict[tuple, int] = {}
    for row in (row for prompt in group for row in prompt.rows):
        seen[row.key] = seen.get(row.key, row.placeholders) + len(row.ids) - row.placeholders
    return sum(seen.values())


def _full_attention(model: Any) -> bool:
    """True when every layer attends to all tokens before it, so that branches can share a prefix."""
    if getattr(model, "injector", None) is not None or getattr(model, "takes_text", False):
        return False  # its media depend on the whole row, and go beside the cache that the model returns
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return all(kind == "full_attention" for kind in kinds)
    return not getattr(config, "sliding_window", None) and "mamba" not in config.model_type


def _end_ids(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end an answer, the tokenizer's own first."""
    found: list[int] = []
    generation = getattr(model, "generation_config", None)
    for value in (getattr(tokenizer, "eos_token_id", None), getattr(generation, "eos_token_id", None)):
        for token in value if isinstance(value, (list, tuple)) else [value]:
            if token is not None and token not in found:
                found.append(int(token))
    return found
