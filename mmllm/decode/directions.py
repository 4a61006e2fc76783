"""Steering directions for ``vti``: what distinguishes right from hallucinated answers inside this model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmllm.decode.engine import Decoder
from mmllm.decode.prefill import build_trees, prefill
from mmllm.decode.requests import Request
from mmllm.decode.rows import Ends
from mmllm.errors import UserError


@torch.inference_mode()
def text_directions(decoder: Decoder, demos: Sequence[tuple[list[dict[str, Any]], str, str]]) -> Tensor:
    """[layers, H] unit vectors from hallucinated to right answers (VTI, arXiv 2410.15778, section 4).

    Per layer the first principal direction, through the origin, of the differences between the states at the last
    token of the right and of the hallucinated answer, turned so that it points to the right ones.

    Args:
        demos: (messages, right answer, hallucinated answer).
    """
    numbers = list(range(1, len(decoder.inside.layers) + 1))
    differences = []
    for messages, right, wrong in demos:
        (prompt,) = decoder.prompts([Request(messages)])
        row = prompt.rows[0]
        answers = [decoder.encoder.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (right, wrong)]
        states = []
        for tokens in answers:
            # One token more, so that the last one of the answer predicts something and its state is kept.
            wanted = [*tokens, decoder.end_ids[0]]
            trees = build_trees([row], {id(row): [wanted]}, share=False)
            part = prefill(decoder.model, decoder.encoder, decoder.inside, trees, False, states=numbers, share=False)
            at = Ends(decoder.inside, [part]).places(row, wanted)[-1]
            states.append(torch.stack([part.captured.states[n][at].float() for n in numbers]))
        differences.append(states[0] - states[1])
    stacked = torch.stack(differences, dim=1)  # [layers, demos, H]
    _, _, directions = torch.linalg.svd(stacked, full_matrices=False)
    first = directions[:, 0]
    sign = (stacked.mean(1) * first).sum(-1, keepdim=True).sign()
    return first * torch.where(sign == 0, 1.0, sign)


def write_directions(path: Path, directions: Tensor) -> None:
    """Writes what ``vti:vectors=FILE`` reads."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"directions": directions.contiguous()}, path)


def read_demos(path: Path) -> list[tuple[list[dict[str, Any]], str, str]]:
    """Demos from JSON lines: ``{"image" or "audio": path, "question", "right", "hallucinated"}``.

    Raises:
        UserError: unreadable file or a line without one of the keys.
    """
    from mmllm.data.records import read_records

    demos = []
    for number, record in enumerate(read_records(path), 1):
        missing = [k for k in ("right", "hallucinated") if not record.get(k)]
        if missing:
            raise UserError(f"line {number} has no '{missing[0]}'", path, "each line needs right and hallucinated")
        media = [{"type": kind, kind: record[kind]} for kind in ("image", "audio") if kind in record]
        question = {"type": "text", "text": record.get("question", "What is in the picture?")}
        demos.append(([{"role": "user", "content": [*media, question]}], record["right"], record["hallucinated"]))
    if not demos:
        raise UserError("no demos", path, "give at least one line")
    return demos
