"""Methods for plain transformers: ``model.generate(**inputs, custom_generate=generate_views, decode="vcd")``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mmllm.decode.engine import Decoder
from mmllm.decode.parse import parse_spec
from mmllm.decode.prepare import prepare
from mmllm.decode.prompts import Media, Prompt, PromptEncoder
from mmllm.decode.requests import Request
from mmllm.decode.spec import DecodeSpec, View
from mmllm.errors import UserError

# The arguments that hold media; named here, generate hands them over before it runs the tower on them.
_MEDIA = {"pixel_values": "image", "input_features": "audio"}


def generate_views(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    decode: str | Mapping[str, Any] | DecodeSpec = "greedy",
    decode_seed: int = 0,
    token_streamer: Any = None,
    pixel_values: Tensor | None = None,
    input_features: Tensor | None = None,
    feature_attention_mask: Tensor | None = None,
    **model_kwargs: Any,
) -> Tensor:
    """For ``custom_generate`` of transformers' ``generate``: prompt ids [B, L] -> prompt and answer [B, L + T].

    ``generate`` keeps its own ``streamer`` to itself, so a streamer is given as ``token_streamer``. Row i draws its
    tokens and noise from ``decode_seed + i``. Media come as processed tensors, so only operations on these are
    possible; for others, and for processors that cut pictures into tiles, use ``mmllm.decode.Decoder``.

    Raises:
        UserError: the method needs messages or pictures, or the media cannot be told apart.
    """
    if model_kwargs.get("image_grids") is not None:
        raise UserError("this model's pictures are cut into tiles", "decode", "use mmllm.decode.Decoder")
    spec = parse_spec(decode)
    if generation_config.do_sample and not spec.do_sample:
        spec = replace(spec, temperature=1.0)  # the warpers among the processors have applied the rest
    if any(view.text for view in spec.views):
        raise UserError(f"'{spec.name}' changes the words of a prompt", "decode", "use mmllm.decode.Decoder")
    n = generation_config.num_return_sequences or 1
    attention_mask = model_kwargs.get("attention_mask")
    keep = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    prompts_ids = [row[m.bool()].tolist() for row, m in zip(input_ids[::n], keep[::n])]
    decoder = Decoder(model, None)
    media = _media_of(decoder.encoder, prompts_ids, pixel_values, input_features, feature_attention_mask)
    end = generation_config.eos_token_id
    requests, prompts = [], []
    for i, (ids, shown) in enumerate(zip(prompts_ids, media)):
        requests.append(
            Request(
                [],
                spec,
                max_new_tokens=max(1, generation_config.max_length - input_ids.shape[1]),
                seed=decode_seed + i,
                n=n,
                eos_token_id=tuple(end if isinstance(end, (list, tuple)) else [] if end is None else [end]),
                logits_processor=list(logits_processor or ()),
                stopping_criteria=list(stopping_criteria or ()),
            )
        )
        prompts.append(_prompt(decoder.encoder, i, requests[-1], ids, shown))
    prepare(decoder, prompts)
    watch = None if token_streamer is None else lambda step: token_streamer.put(torch.tensor([step.token]))
    results = decoder.run(prompts, requests, observer=watch)
    if token_streamer is not None:
        token_streamer.end()
    answers = [x for result in results for x in (result, *result.alternatives)]
    made = [x.token_ids + ([x.end_token_id] if x.end_token_id is not None else []) for x in answers]
    pad = generation_config.pad_token_id or 0
    longest = max(len(ids) for ids in made)
    new = torch.tensor([ids + [pad] * (longest - len(ids)) for ids in made], device=input_ids.device)
    return torch.cat([input_ids, new], dim=1)


def _prompt(encoder: PromptEncoder, index: int, request: Request, ids: list[int], media: list[Media]) -> Prompt:
    """A prompt from ready ids; a view without media loses their placeholders."""
    prompt = Prompt(index, request.spec, request.seed)
    special = set(encoder.placeholder_ids.values())
    for view in (View(model=request.spec.base), *request.spec.views):
        shown = encoder.shown(view, media, request.seed)
        if shown and len(shown) < len(media):
            raise UserError("this view drops some media and keeps others", "decode", "use mmllm.decode.Decoder")
        left = ids if shown or not media else [token for token in ids if token not in special]
        prompt.add(encoder.row(left, shown, view.model))
    return prompt


def _media_of(
    encoder: PromptEncoder,
    prompts: Sequence[list[int]],
    pixel_values: Tensor | None,
    input_features: Tensor | None,
    feature_attention_mask: Tensor | None,
) -> list[list[Media]]:
    """The media of each prompt, told apart by their placeholders: each takes the same number."""
    found: list[list[tuple[int, Media]]] = [[] for _ in prompts]
    for name, tensor in (("pixel_values", pixel_values), ("input_features", input_features)):
        if tensor is None:
            continue
        kind = _MEDIA[name]
        token = encoder.placeholder_ids.get(kind)
        counts = [sum(t == token for t in ids) for ids in prompts]
        each, rest = divmod(sum(counts), len(tensor))
        if rest or not each or any(c % each for c in counts):
            do = "use mmllm.decode.Decoder"
            raise UserError(f"{len(tensor)} {kind}s do not share {sum(counts)} placeholders evenly", name, do)
        mask = feature_attention_mask if kind == "audio" else None
        at = 0
        for i, (ids, count) in enumerate(zip(prompts, counts)):
            places = [p for p, t in enumerate(ids) if t == token]
            for k in range(count // each):
                part = {name: tensor[at : at + 1]}
                part |= {"feature_attention_mask": mask[at : at + 1]} if mask is not None else {}
                item = Media(kind, f"{name}{at}", lambda: None, ready=(part, each))
                found[i].append((places[k * each], item))
                at += 1
    return [[item for _, item in sorted(items, key=lambda pair: pair[0])] for items in found]
