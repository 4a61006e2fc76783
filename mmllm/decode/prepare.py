"""What some methods need before the first token: descriptions, blind tokens, steering directions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmllm.decode.attention import row_attention
from mmllm.decode.inside import Frame
from mmllm.decode.prefill import build_trees, prefill
from mmllm.decode.prompts import Prompt, Row
from mmllm.decode.requests import Request
from mmllm.decode.rows import Ends
from mmllm.decode.spec import Op
from mmllm.decode.text_views import asking_instead
from mmllm.errors import UserError

if TYPE_CHECKING:
    from mmllm.decode.engine import Decoder


def captions(decoder: Decoder, requests: Sequence[Request]) -> list[str | None]:
    """For each request whose method has a view with operation ``caption``, the model's greedy description."""
    wanted: dict[tuple, list[int]] = {}
    asked: dict[tuple, Request] = {}
    for i, request in enumerate(requests):
        op = next((op for view in request.spec.views for op in view.text if op.name == "caption"), None)
        if op is None:
            continue
        messages = asking_instead(request.messages, op["question"])
        made = decoder.encoder.prompt(i, Request(messages)).rows[0]
        if not made.shown:
            continue
        key = (made.key, tuple(made.ids), op)
        asked.setdefault(key, Request(messages, max_new_tokens=op["max_new_tokens"], seed=request.seed))
        wanted.setdefault(key, []).append(i)
    found: list[str | None] = [None] * len(requests)
    for key, result in zip(asked, decoder.generate(list(asked.values()))):
        for i in wanted[key]:
            found[i] = result.text
    return found


def prepare(decoder: Decoder, prompts: Sequence[Prompt]) -> None:
    """Fills ``Row.kept`` and ``Row.directions`` of all rows whose operations need them.

    Raises:
        UserError: a file of directions that cannot be used.
    """
    for prompt in prompts:
        for row in prompt.rows:
            for op in row.model:
                if op.name == "blind":
                    row.kept = _seen_most(decoder, row, op)
                elif op.name == "steer":
                    row.directions = load_directions(op["vectors"], len(decoder.inside.layers))
                elif op.name == "steer_image":
                    row.directions = _media_directions(decoder, row)


@torch.inference_mode()
def _seen_most(decoder: Decoder, row: Row, op: Op) -> Tensor:
    """[media tokens] bool: attention above mean + deviations * std, averaged over the layers that look most."""
    plain = Row(row.ids, row.shown, (), row.media_places)
    frame = Frame([plain], [row.media_places], [[len(row.ids) - 1]], [row.media_places])
    with row_attention(decoder.inside, frame, record=True) as read:
        _run_dense(decoder, plain)
    attention = torch.stack(read.mass[0])  # [layers, media tokens]
    share = attention.sum(1) / attention.sum()
    order = share.argsort(descending=True, stable=True)
    # Layers until their shares together reach gamma, the one that crosses it included.
    count = int((share[order].cumsum(0) < op["gamma"]).sum()) + 1
    mean = attention[order[:count]].mean(0)
    return (mean >= mean.mean() + op["deviations"] * mean.std(correction=0)).cpu()


def _run_dense(decoder: Decoder, row: Row) -> None:
    """One forward of one row under an additive mask, as changed attention needs it."""
    from mmllm.decode.prompts import join

    model = decoder.model
    dtype = model.get_input_embeddings().weight.dtype
    length = len(row.ids)
    mask = torch.full((length, length), torch.finfo(dtype).min, dtype=dtype).triu(1)[None, None]
    model(
        input_ids=torch.tensor([row.ids], device=model.device),
        attention_mask=mask.to(model.device),
        position_ids=torch.arange(length, device=model.device)[None],
        use_cache=False,
        **{k: v.to(model.device) for k, v in join(decoder.encoder.tensors(row)).items()},
    )


@torch.inference_mode()
def _media_directions(decoder: Decoder, row: Row) -> Tensor:
    """[layers, H]: state at the last prompt token with the media minus the one without them."""
    special = set(row.media_places)
    bare = [token for i, token in enumerate(row.ids) if i not in special]
    both = [Row(row.ids, row.shown, (), row.media_places), Row(bare, (), (), [])]
    layers = range(1, len(decoder.inside.layers) + 1)
    trees = build_trees(both, {}, share=False)
    part = prefill(decoder.model, decoder.encoder, decoder.inside, trees, False, states=list(layers), share=False)
    ends = Ends(decoder.inside, [part])
    at = [int(ends.places(r)[0]) for r in both]
    return torch.stack(
        [part.captured.states[n][at[0]].float() - part.captured.states[n][at[1]].float() for n in layers]
    )


@lru_cache(maxsize=8)
def load_directions(path: str, layers: int) -> Tensor:
    """[layers, H] from key ``directions`` of a safetensors file.

    Raises:
        UserError: no such file, not safetensors, another number of layers.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path or not Path(path).is_file():
        raise UserError(
            "no file of steering directions", path or "vti", "give vti:vectors=FILE; mmllm decode directions makes one"
        )
    try:
        found = load_file(path).get("directions")
    except SafetensorError as e:
        raise UserError(f"no safetensors file ({e})", path) from None
    if found is None or found.dim() != 2 or len(found) != layers:
        shape = None if found is None else list(found.shape)
        raise UserError(f"'directions' must be [{layers}, width], it is {shape}", path, "make them with this model")
    return found
