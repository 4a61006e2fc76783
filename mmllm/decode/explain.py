"""What a decoding method does, in words and figures: formula, rows per token, gain, weaknesses."""

from __future__ import annotations

import inspect
from typing import Any

from mmllm.decode.ops import OPS
from mmllm.decode.parse import parse_spec
from mmllm.decode.presets import preset_names, preset_of
from mmllm.decode.spec import DecodeSpec, Op, Tap, Term

LEFT_OUT = "opera and halc are no methods here: they own the search (beams, rollback, re-ranking by other models)."


def method_table() -> list[tuple[str, ...]]:
    """(method, rows per token, gain, what it does) of every preset."""
    rows = []
    for name in preset_names():
        spec = parse_spec(name)
        rows.append((name, str(rows_per_token(spec)), gain_text(spec), _first_line(name)))
    return rows


def explanation(spec: DecodeSpec) -> list[tuple[str, str]]:
    """(heading, text) pairs that tell a user what he switches on."""
    found = [("method", str(spec)), ("scores", formula(spec))]
    found += [(name, inspect.getdoc(preset_of(name)) or "") for name, _ in spec.methods]
    for i, view in enumerate(spec.views, 1):
        ops = (*view.media, *view.text, *view.model)
        found.append((f"view {i}", "; ".join(f"{_show(op)}: {OPS[op.name].doc}" for op in ops)))
    found += [("view 0", f"{_show(op)}: {OPS[op.name].doc}") for op in spec.base]
    found += [("mask", f"{_show(op)}: {OPS[op.name].doc}") for op in spec.masks]
    found.append(("rows per token", f"{rows_per_token(spec)} of one batch{_further_cost(spec)}"))
    found.append(("gain", f"{gain_text(spec)} ({_gain_meaning(spec)})"))
    for name, _ in spec.methods:
        parameters = inspect.signature(preset_of(name)).parameters.values()
        if parameters:
            found.append((f"{name} defaults", ", ".join(f"{p.name}={p.default}" for p in parameters)))
        found.append((f"{name} is bad at", getattr(preset_of(name), "weakness", "")))
    if any(OPS[op.name].moves for view in spec.views for op in view.media):
        found.append(("careful", "a view changes where things are: answers about places, boxes and writing may suffer"))
    return found


def formula(spec: DecodeSpec) -> str:
    """The scores as a sum, such as ``z_0 + 1 (z_0 - z_diffuse)``."""
    text = "z_0" + "".join(_term(term, view_names(spec)) for term in spec.terms)
    return f"({text}) / {spec.raw_gain:g}" if spec.normalize and spec.raw_gain != 1 else text


def view_names(spec: DecodeSpec) -> list[str]:
    """A short name for each view, view 0 first."""
    names = ["base"]
    for view in spec.views:
        ops = (*view.media, *view.text, *view.model)
        name = "+".join(op.name for op in ops) or "same"
        names.append(name if name not in names else f"{name} {len(names)}")
    return names


def rows_per_token(spec: DecodeSpec) -> int:
    """Rows of the batch that each token takes, when no two views come out alike."""
    return 1 + len(spec.views)


def gain_text(spec: DecodeSpec) -> str:
    """The gain as a figure, or as a range where it depends on the logits."""
    if not spec.normalize and any(t.rule and t.kind == "add" for t in spec.terms):
        return f"1..{spec.raw_gain:g}"
    return f"{spec.gain:g}"


def _gain_meaning(spec: DecodeSpec) -> str:
    if spec.gain == 1:
        return "where the views agree, the base logits come out"
    if spec.gain == 0:
        return "where the views agree, nothing is left but the mask"
    return "what agreeing logits are multiplied by: an inverse temperature; normalize=true takes it away"


def _further_cost(spec: DecodeSpec) -> str:
    ops = [op.name for op in (*spec.base, *(o for v in spec.views for o in (*v.text, *v.model)))]
    extra = {
        "caption": "one description of the media first",
        "blind": "one more prefill",
        "steer_image": "two more prefills",
    }
    found = [extra[name] for name in dict.fromkeys(ops) if name in extra]
    if spec.taps:
        found.append("the output head on the tapped layers")
    return "".join(f"; {text}" for text in found)


def _term(term: Term, names: list[str]) -> str:
    name = (
        f"{term.source.select} of layers {term.source.layers}" if isinstance(term.source, Tap) else names[term.source]
    )
    sign, weight = ("-", -term.weight) if term.weight < 0 else ("+", term.weight)
    factor = f"{weight:g}" + (f" {_show(term.rule)}" if term.rule else "")
    return f" {sign} {factor} " + (f"(z_0 - z[{name}])" if term.kind == "contrast" else f"z[{name}]")


def _show(op: Op | Any) -> str:
    given = ", ".join(f"{k}={v}" for k, v in op.args if v is not None)
    return f"{op.name}({given})" if given else op.name


def _first_line(name: str) -> str:
    return (inspect.getdoc(preset_of(name)) or "").split("\n")[0]
