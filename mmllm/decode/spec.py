"""A decoding method as data: views of the prompt, their weights, a plausibility mask and how a token is picked."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from mmllm.errors import UserError, unknown
from mmllm.registry import get, names, register

# Media transforms of RITUAL (Woo et al. 2024); "random" draws one of the six per request.
RITUAL_TRANSFORMS = ("hflip", "vflip", "rotate", "jitter", "blur", "crop")


@dataclass(frozen=True)
class View:
    """The prompt with changed media.

    Attributes:
        op: name of a media operation in ``mmllm.decode.views`` (``diffuse``, ``hflip``, ..., ``identity``).
        weight: what the logits of this view are multiplied by.
        args: parameters of the operation as (name, value) pairs.
    """

    op: str
    weight: float
    args: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class DecodeSpec:
    """How to choose tokens: ``scores = base_weight * z_0 + sum_k weight_k * z_k``, masked, then picked.

    View 0 is always the untouched prompt. The mask keeps token i where ``z_0[i] >= max(z_0) + log(beta)``.

    Attributes:
        name: the preset's name.
        params: the preset's parameters that differ from its defaults, for ``str(spec)``.
        views: the further views.
        base_weight: weight of view 0.
        beta: plausibility threshold in [0, 1]; 0 switches the mask off.
        normalize: divide the weighted sum by the gain, so that agreeing views give the base logits.
        temperature: 0 takes the best token, above 0 samples; applied after mix and mask.
        top_k, top_p, min_p: cuts of the sampling distribution; 0, 1 and 0 switch them off.
    """

    name: str = "greedy"
    params: tuple[tuple[str, Any], ...] = ()
    views: tuple[View, ...] = ()
    base_weight: float = 1.0
    beta: float = 0.0
    normalize: bool = False
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    label_preserving: bool = field(default=True, compare=False)

    @property
    def gain(self) -> float:
        """What the logits are multiplied by when all views agree: an inverse temperature (1 after ``normalize``)."""
        return 1.0 if self.normalize else self.base_weight + sum(v.weight for v in self.views)

    @property
    def weights(self) -> tuple[float, ...]:
        """Weight of every view, view 0 first, with ``normalize`` applied."""
        raw = (self.base_weight, *(v.weight for v in self.views))
        total = sum(raw)
        return tuple(w / total for w in raw) if self.normalize else raw

    @property
    def do_sample(self) -> bool:
        return self.temperature > 0

    def __str__(self) -> str:
        return self.name + (":" + ",".join(f"{k}={_show(v)}" for k, v in self.params) if self.params else "")


def _show(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


@register("decode", "greedy")
def greedy() -> DecodeSpec:
    """The best token at each step."""
    return DecodeSpec("greedy")


@register("decode", "sample")
def sample(temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> DecodeSpec:
    """Plain sampling."""
    return DecodeSpec("sample", temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)


@register("decode", "vcd")
def vcd(alpha: float = 1.0, beta: float = 0.1, step: int = 500, temperature: float = 0.0) -> DecodeSpec:
    """Visual contrastive decoding (Leng et al. 2023, arXiv 2311.16922): (1 + alpha) z_0 - alpha z_noised, gain 1."""
    if not 0 <= step <= 999:
        raise UserError(f"step={step} is not in 0..999", "decode vcd")
    views = (View("diffuse", -alpha, (("step", step),)),) if alpha else ()
    return DecodeSpec("vcd", views=views, base_weight=1 + alpha, beta=beta, temperature=temperature)


@register("decode", "ritual")
def ritual(
    alpha: float = 3.0,
    beta: float = 0.1,
    transform: str = "random",
    normalize: bool = False,
    temperature: float = 0.0,
) -> DecodeSpec:
    """RITUAL (Woo et al. 2024, arXiv 2405.17821): z_0 + alpha z_transformed; gain 1 + alpha unless normalised.

    ``transform`` is one of hflip, vflip, rotate, jitter, blur, crop, identity, or random: one of the first six, drawn
    for each request. Flips, rotations and crops change what "left", "above" and boxes mean.
    """
    valid = (*RITUAL_TRANSFORMS, "random", "identity")
    if transform not in valid:
        raise unknown("transform", transform, valid, "decode ritual")
    views = (View(transform, alpha),) if alpha else ()
    return DecodeSpec(
        "ritual",
        views=views,
        beta=beta,
        normalize=normalize,
        temperature=temperature,
        label_preserving=transform in ("jitter", "blur", "identity"),
    )


def parse_spec(spec: str | DecodeSpec) -> DecodeSpec:
    """``"vcd:alpha=1,beta=0.1,step=500"`` -> DecodeSpec; a DecodeSpec passes through.

    Raises:
        UserError: unknown method or parameter (with the nearest valid one), or a value that cannot be read.
    """
    if isinstance(spec, DecodeSpec):
        return spec
    name, _, rest = spec.strip().partition(":")
    if not name:
        raise UserError("empty decoding method", do=f"valid: {', '.join(names('decode'))}")
    build: Callable[..., DecodeSpec] = get("decode", name)
    valid = inspect.signature(build, eval_str=True).parameters
    given: dict[str, Any] = {}
    for item in filter(None, (part.strip() for part in rest.split(","))):
        key, eq, text = (s.strip() for s in item.partition("="))
        if not eq:
            raise UserError(f"'{item}' is not key=value", f"decode {name}", f"write {name}:KEY=VALUE,...")
        if key not in valid:
            raise unknown("parameter", key, valid, f"decode {name}")
        given[key] = _read(text, valid[key].annotation, f"decode {name}: {key}")
    built = build(**given)
    for key in ("beta", "top_p", "min_p"):
        if not 0 <= getattr(built, key) <= 1:
            raise UserError(f"{key}={getattr(built, key):g} is not in 0..1", f"decode {name}")
    if built.temperature < 0 or built.top_k < 0:
        raise UserError("temperature and top_k cannot be negative", f"decode {name}")
    if built.normalize and built.base_weight + sum(v.weight for v in built.views) <= 0:
        raise UserError("normalize needs weights with a positive sum", f"decode {name}")
    changed = tuple((k, v) for k, v in given.items() if v != valid[k].default)
    return DecodeSpec(**{**_fields(built), "params": changed})


def _fields(spec: DecodeSpec) -> dict[str, Any]:
    return {key: getattr(spec, key) for key in spec.__dataclass_fields__}


def _read(text: str, kind: type, where: str) -> Any:
    if kind is bool:
        if text.lower() in ("true", "yes", "1", "false", "no", "0"):
            return text.lower() in ("true", "yes", "1")
        raise UserError(f"'{text}' is not true or false", where)
    try:
        value = kind(text)
    except ValueError:
        wanted = {"int": "an integer", "float": "a number"}.get(kind.__name__, kind.__name__)
        raise UserError(f"'{text}' is not {wanted}", where) from None
    if kind is float and value - value != 0:  # nan or infinite
        raise UserError(f"'{text}' is not a finite number", where)
    return value
