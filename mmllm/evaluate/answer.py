"""Puts questions to a decoder in portions that share their media, in one process or several."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmllm.collector import few_collections
from mmllm.errors import UserError

# Scored questions go to the decoder in portions of this many, so that progress shows and memory stays flat.
SCORE_PORTION = 256
GENERATE_PORTION = 64


@dataclass
class Asked:
    """One question on its way through the decoder.

    Attributes:
        messages: the prompt.
        media: paths or recordings in it; questions on the same ones share their computed prefix.
        kind: of the media.
        choices: answers to choose from by probability; None asks for free text.
        max_new_tokens: of free text.
        seed: of decoding methods that draw.
        decode: the decoding method.
    """

    messages: list[dict[str, Any]]
    media: list[str]
    kind: str = "image"
    choices: list[str] | None = None
    max_new_tokens: int = 32
    seed: int = 0
    decode: str = "greedy"

    def request(self) -> Any:
        """The same as the decoder reads it."""
        from mmllm.decode import Request

        return Request(self.messages, self.decode, max_new_tokens=self.max_new_tokens, seed=self.seed)


Answer = tuple[str, list[float] | None]
Trace = list[dict[str, Any]]


def answer(decoder: Any, asked: Sequence[Asked], said: Callable[[int, int], None] | None = None) -> list[Answer]:
    """The answers, in the order of the questions: text, and the log-probabilities of the choices where there are any.

    Questions on the same media stand side by side, so that the decoder computes their common prefix once; free answers
    of similar length are generated together.

    Args:
        said: told (answered, of all) after each portion.
    """
    out: list[Answer | None] = [None] * len(asked)
    scored = sorted(
        (i for i, a in enumerate(asked) if a.choices), key=lambda i: (asked[i].decode, asked[i].kind, asked[i].media)
    )
    free = [i for i, a in enumerate(asked) if not a.choices]
    free.sort(key=lambda i: (asked[i].decode, asked[i].max_new_tokens, asked[i].media))

    done = 0
    for portion in media_portions(scored, SCORE_PORTION, lambda i: asked[i].media):
        results = decoder.score([asked[i].request() for i in portion], [asked[i].choices for i in portion])
        for i, scores in zip(portion, results, strict=True):
            choices = asked[i].choices or []
            best = max(range(len(scores)), key=lambda k: scores[k])
            out[i] = (choices[best], [float(x) for x in scores])
        done += len(portion)
        if said:
            said(done, len(asked))
    for start in range(0, len(free), GENERATE_PORTION):
        portion = free[start : start + GENERATE_PORTION]
        for i, result in zip(portion, decoder.generate([asked[i].request() for i in portion]), strict=True):
            out[i] = (result.text, None)
        done += len(portion)
        if said:
            said(done, len(asked))
    assert all(a is not None for a in out)
    return out  # type: ignore[return-value]


def media_portions(items: Sequence[Any], size: int, media: Callable[[Any], list[str]]) -> list[list[Any]]:
    """Consecutive portions of about ``size`` items that never part items on the same media."""
    portions: list[list[Any]] = []
    last: list[str] | None = None
    for item in items:
        found = media(item)
        if not portions or (len(portions[-1]) >= size and (found != last or not last)):
            portions.append([])
        portions[-1].append(item)
        last = found
    return portions


def shares(asked: Sequence[Asked], nproc: int) -> list[list[int]]:
    """The numbers of the questions for each process: all on the same media in one, about as many in each."""
    order = sorted(range(len(asked)), key=lambda i: (asked[i].decode, asked[i].kind, asked[i].media, i))
    out: list[list[int]] = [[] for _ in range(nproc)]
    # Scored and free ones are dealt out apart, and by turns, so that no process has all the long answers.
    for free in (False, True):
        mine = [i for i in order if (not asked[i].choices) == free]
        for turn, portion in enumerate(media_portions(mine, 1, lambda i: asked[i].media)):
            out[turn % nproc] += portion
    return [share for share in out if share]


def trace(decoder: Any, asked: Sequence[Asked]) -> list[Trace]:
    """How each answer came about, token by token (:func:`mmllm.decode.trace.trace_request`)."""
    from mmllm.decode.trace import trace_request

    return [trace_request(decoder, a.request()) for a in asked]


def answer_in_processes(
    model: str | Path, asked: Sequence[Asked], nproc: int, traced: Sequence[Asked] = ()
) -> tuple[list[Answer], list[Trace]]:
    """The same as ``answer`` and ``trace``, by ``nproc`` processes with a copy of the model each.

    Where there are several GPUs each process has one. Answers are those of one process up to the rounding of other
    batches. Without a question nothing is loaded, nor traced.

    Raises:
        UserError: what a process says, or that one was killed.
    """
    from mmllm.openmp import available_cores

    dealt = shares(asked, nproc)
    if not dealt:
        return [], []
    threads = max(1, available_cores() // max(1, len(dealt)))
    out: list[Answer | None] = [None] * len(asked)
    steps: list[Trace] = []
    # Spawned, not forked: a fork of a process whose OpenMP threads have run can hang.
    with ProcessPoolExecutor(len(dealt), multiprocessing.get_context("spawn"), few_collections) as pool:
        todo = [
            # The last share is never the longest, so its process has the time for the traces.
            pool.submit(
                _share, str(model), [asked[i] for i in share], rank, threads, traced if share is dealt[-1] else ()
            )
            for rank, share in enumerate(dealt)
        ]
        try:
            for share, future in zip(dealt, todo, strict=True):
                found = future.result()
                if isinstance(found, Failed):
                    raise UserError(found.what, found.where, found.do)
                for i, one in zip(share, found.answers, strict=True):
                    out[i] = one
                steps += found.traces
        except BrokenProcessPool:
            raise UserError("a process was killed (out of memory?)", "--nproc", "take fewer processes") from None
    return out, steps  # type: ignore[return-value]


@dataclass
class Done:
    """What a process found."""

    answers: list[Answer]
    traces: list[Trace]


@dataclass
class Failed:
    """The parts of a user's mistake, since exceptions travel badly between processes."""

    what: str
    where: str | None
    do: str | None


def _share(model: str, asked: list[Asked], rank: int, threads: int, traced: Sequence[Asked]) -> Done | Failed:
    """One process's share."""
    import torch

    torch.set_num_threads(threads)
    try:
        device = f"cuda:{rank % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
        decoder = load_decoder(model, device)
        answers = answer(decoder, asked, Progress(len(asked)).at if rank == 0 else None)
        return Done(answers, trace(decoder, traced))
    except UserError as e:
        return Failed(e.what, None if e.where is None else str(e.where), e.do)


def load_decoder(model_path: str | Path | None, device: str = "auto") -> Any:
    """The decoder on a trained model.

    Raises:
        UserError: no path, or not a multimodal model.
    """
    from mmllm.decode import Decoder
    from mmllm.model import load_model

    if model_path is None:
        raise UserError("these tasks need a model", "--model", "give --model RUN")
    model, processor = load_model(str(model_path), device=device)
    model = model.eval()
    wide_head(model)
    if model.device.type == "cpu":
        quick_on_cpu(model)
    return Decoder(model, processor)


def wide_head(model: Any) -> None:
    """Logits in float32 where the head is a linear layer in 16 bits, from its own inputs and weights.

    Bfloat16 has steps of 0.125 where logits are 16 to 32, so that every fifth "left" or "right" was as likely as the
    other, and the first one was taken.
    """
    from torch import nn

    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.weight.dtype.itemsize != 2:
        return
    weight, bias = head.weight.detach().float(), None if head.bias is None else head.bias.detach().float()
    head.forward = lambda input: nn.functional.linear(input.float(), weight, bias)


def quick_on_cpu(model: Any) -> None:
    """Short prompts by plain attention (``mmllm.blocks.plain_attention``), pictures by a frozen copy of the tower.

    The tower computes as the LLM does, in bfloat16 where that is the LLM's: so training made its features, too.
    """
    from mmllm.model.plain_attention import NAME

    model.language_model.set_attn_implementation(NAME)
    tower = model.vision_tower
    if tower is not None:
        model.vision_tower = tower.frozen_copy().to(model.get_input_embeddings().weight.dtype)


class Progress:
    """A line now and then: questions answered, rate, time left."""

    def __init__(self, total: int, every: float = 10.0):
        self.total, self.every, self.done = total, every, 0
        self.start = self.said = time.monotonic()

    def add(self, count: int) -> None:
        self.at(self.done + count, self.total)

    def at(self, done: int, total: int) -> None:
        self.done = done
        now = time.monotonic()
        if now - self.said >= self.every or done == total:
            self.said = now
            rate = done / max(now - self.start, 1e-6)
            left = (total - done) / rate
            print(f"eval: {done} of {total} questions, {rate:.1f}/s, {left:.0f} s left", flush=True)
