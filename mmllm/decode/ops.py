"""The table of operations that views, masks and rules are made of: parameters, ranges, and what each one touches."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mmllm.decode.spec import Op
from mmllm.errors import UserError, unknown


@dataclass(frozen=True)
class Param:
    """A parameter: its default (whose type is the parameter's), its range, or its choices; None: optional number."""

    default: Any
    low: float = -math.inf
    high: float = math.inf
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Kind:
    """What an operation is.

    Attributes:
        stage: ``picture``, ``sound`` or ``media`` (both), ``text``, ``model``, ``mask``, ``rule``.
        doc: one line.
        seeded: its result depends on the request's seed.
        moves: it changes where things are, so answers about places may turn wrong.
        reads: it reads or changes attention, so its rows share no prefix with others.
    """

    stage: str
    doc: str
    params: Mapping[str, Param] = field(default_factory=dict)
    seeded: bool = False
    moves: bool = False
    reads: bool = False


_GRID = Param(4, 1, 64)
LAYERS = Param("0.5:1")

OPS: dict[str, Kind] = {
    "identity": Kind("media", "nothing changed"),
    "drop": Kind("media", "the media and their place in the prompt are left out"),
    "blank": Kind("media", "one even colour instead of the picture, silence instead of the sound",
                  {"fill": Param("mean", choices=("mean", "black", "white"))}),
    "other": Kind("media", "another picture or sound instead", {"path": Param("")}),
    "diffuse": Kind("media", "Gaussian noise of a diffusion step on processed pixels or log-mel",
                    {"step": Param(500, 0, 999)}, seeded=True),
    "patch_shuffle": Kind("media", "tiles of the picture, or pieces of the sound, in random order",
                          {"grid": _GRID}, seeded=True, moves=True),
    "patch_mask": Kind("media", "a share of the tiles, or of the pieces, made even grey or silent",
                       {"ratio": Param(0.5, 0, 1), "grid": _GRID}, seeded=True),
    "hflip": Kind("picture", "mirrored left to right", moves=True),
    "vflip": Kind("picture", "upside down", moves=True),
    "rotate": Kind("picture", "turned by an angle, drawn from -180..180 when none is given",
                   {"degrees": Param(None, -360, 360)}, seeded=True, moves=True),
    "jitter": Kind("picture", "brightness, contrast, saturation and hue changed at random",
                   {"strength": Param(1.0, 0, 1)}, seeded=True),
    "blur": Kind("picture", "Gaussian blur, sigma in pixels drawn from 1.5..2 when none is given",
                 {"sigma": Param(None, 0, 100)}, seeded=True),
    "crop": Kind("picture", "a random part of at least this share of the area, enlarged",
                 {"smallest": Param(0.08, 0.01, 1)}, seeded=True, moves=True),
    "random": Kind("picture", "one of hflip, vflip, rotate, jitter, blur, crop", seeded=True, moves=True),
    "silence": Kind("sound", "zeros instead of the sound"),
    "noise": Kind("sound", "white noise at a signal-to-noise ratio in dB", {"snr": Param(0.0, -60, 60)}, seeded=True),
    "time_reverse": Kind("sound", "played backwards"),
    "system": Kind("text", "another system prompt", {"text": Param("")}),
    "prefix": Kind("text", "words before the question", {"text": Param("")}),
    "after_media": Kind("text", "words right after the last picture or sound", {"text": Param("")}),
    "caption": Kind("text", "the model's own description instead of the media",
                    {"question": Param("What is in the picture?"), "max_new_tokens": Param(48, 1, 512)}),
    "boost": Kind("model", "the predicting token attends more to the media: score + alpha |score|",
                  {"alpha": Param(0.5, 0, 10), "layers": LAYERS}, reads=True),
    "prune": Kind("model", "from a layer on only the least attended share of the media tokens is seen",
                  {"keep": Param(0.17, 0, 1), "from_layer": Param(2, 1, 10_000)}, reads=True),
    "blind": Kind("model", "only media tokens with more attention than mean + deviations * std are kept",
                  {"gamma": Param(0.5, 0, 1), "deviations": Param(1.0, -10, 10)}, reads=True),
    "steer": Kind("model", "directions of a file added behind every MLP, length kept",
                  {"vectors": Param(""), "scale": Param(0.1, 0, 10)}),
    "steer_image": Kind("model", "what the media change in each layer, added behind every MLP, length kept",
                        {"scale": Param(0.1, 0, 10)}, reads=True),
    "apc": Kind("mask", "keeps tokens with p_0 >= beta max p_0", {"beta": Param(0.1, 0, 1)}),
    "nucleus": Kind("mask", "keeps the top_k likeliest tokens inside the top_p nucleus of p_0",
                    {"top_k": Param(20, 1, 1_000_000), "top_p": Param(0.9, 0, 1)}),
    "agreement": Kind("mask", "keeps tokens with p_0 >= D max p_0, D the divergence of a view from view 0 (CODE)",
                      {"view": Param(1, 1, 64)}),
    "growth": Kind("rule", "weight times exp(rate t) - 1, t tokens after ``start``, 0 where max p_0 >= tau (M3ID)",
                   {"rate": Param(0.02, 0, 10), "start": Param(1, 0, 1000), "clip": Param(3.0, 0, 1e6),
                    "tau": Param(1.0, 0, 1)}),
    "closeness": Kind("rule", "weight times 1 - D, D the divergence of the view from view 0 (CODE)"),
    "probability": Kind("rule", "weight times the tap's highest probability of a candidate token (DeCo)"),
}  # fmt: skip


def op(name: str, stage: str | tuple[str, ...] | None = None, **given: Any) -> Op:
    """An operation with all its parameters, checked.

    Args:
        stage: where it must belong, when that matters.

    Raises:
        UserError: unknown operation or parameter (the nearest valid one named), wrong type, outside the range.
    """
    stages = (stage,) if isinstance(stage, str) else stage
    valid = [n for n, kind in OPS.items() if stages is None or kind.stage in stages]
    if name not in valid:
        raise unknown("operation", name, valid, "decode")
    params = OPS[name].params
    for key in given:
        if key not in params:
            raise unknown("parameter", key, params, f"decode {name}")
    return Op(name, tuple((k, checked(given.get(k, p.default), p, f"decode {name}: {k}")) for k, p in params.items()))


def checked(value: Any, param: Param, where: str) -> Any:
    """The value in the parameter's type and range.

    Raises:
        UserError: it cannot be read or lies outside.
    """
    if value is None and param.default is None:
        return None
    kind = float if param.default is None else type(param.default)
    value = read(value, kind, where)
    if param.choices and value not in param.choices:
        raise unknown("value", str(value), param.choices, where)
    if kind in (int, float) and not param.low <= value <= param.high:
        raise UserError(f"{value:g} is not in {param.low:g}..{param.high:g}", where)
    return value


def read(value: Any, kind: type, where: str) -> Any:
    """A string or a value of YAML as ``kind`` (bool, int, float or str).

    Raises:
        UserError: it is something else, or not finite.
    """
    if kind is bool:
        if isinstance(value, bool):
            return value
        if str(value).lower() in ("true", "yes", "1", "false", "no", "0"):
            return str(value).lower() in ("true", "yes", "1")
        raise UserError(f"'{value}' is not true or false", where)
    wanted = {int: "an integer", float: "a number"}.get(kind, "text")
    if isinstance(value, bool) or (kind is int and isinstance(value, float) and value != int(value)):
        raise UserError(f"'{value}' is not {wanted}", where)
    try:
        value = kind(value)
    except (ValueError, TypeError):
        raise UserError(f"'{value}' is not {wanted}", where) from None
    if kind is float and not math.isfinite(value):
        raise UserError(f"'{value}' is not a finite number", where)
    return value
