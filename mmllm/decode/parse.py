"""The written forms of a decoding method: ``vcd:alpha=1+ritual``, objects, and ``@FILE`` with YAML or JSON."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from mmllm.decode.layers import check_layers
from mmllm.decode.ops import OPS, Param, checked, op, read
from mmllm.decode.presets import preset_names, preset_of
from mmllm.decode.spec import DecodeSpec, Op, Select, Tap, Term, View, merge, without_idle
from mmllm.errors import UserError, unknown

# Fields of the whole method rather than of one preset: any part of the string may set them.
SHARED: dict[str, Param] = {
    "normalize": Param(False),
    "temperature": Param(0.0, 0),
    "top_k": Param(0, 0),
    "top_p": Param(1.0, 0, 1),
    "min_p": Param(0.0, 0, 1),
}
_PROGRAM = ("views", "base", "mix", "masks")
_VIEW_STAGES = {"media": ("media", "picture", "sound"), "text": ("text",), "model": ("model",)}


def parse_spec(spec: str | Mapping[str, Any] | DecodeSpec) -> DecodeSpec:
    """A DecodeSpec from its string, its object form, JSON text or ``@FILE`` (YAML or JSON); a DecodeSpec passes.

    The string is ``METHOD:KEY=VALUE,...`` with methods joined by ``+``; values with commas, plus signs or spaces at
    the ends stand in double quotes. ``normalize``, ``temperature``, ``top_k``, ``top_p`` and ``min_p`` may be given
    with any method and hold for the whole.

    Raises:
        UserError: unknown method, operation or parameter (with the nearest valid one), a value that cannot be read or
            lies outside its range, an unreadable file.
    """
    if isinstance(spec, DecodeSpec):
        return spec
    if isinstance(spec, Mapping):
        return from_object(spec)
    text = spec.strip()
    if not text:
        raise UserError("empty decoding method", do=f"valid: {', '.join(preset_names())}")
    if text.startswith("@"):
        return from_object(_load(Path(text[1:]).expanduser()))
    if text.startswith("{"):
        try:
            return from_object(json.loads(text))
        except json.JSONDecodeError as e:
            raise UserError(f"not JSON: {e}", "decode") from None
    methods, shared = [], {}
    for part in _split(text, "+"):
        name, _, rest = part.partition(":")
        given: dict[str, Any] = {}
        for item in _split(rest, ","):
            key, eq, value = (s.strip() for s in item.partition("="))
            if not eq:
                raise UserError(f"'{item}' is not key=value", f"decode {name}", f"write {name}:KEY=VALUE,...")
            given[key] = value[1:-1] if len(value) > 1 and value[0] == value[-1] == '"' else value
        methods.append((name.strip(), given))
    for _, given in methods:
        shared |= {key: given.pop(key) for key in list(given) if key in SHARED}
    return _from_methods(methods, shared)


def from_object(data: Mapping[str, Any]) -> DecodeSpec:
    """The object form: ``{"methods": [{"name": "vcd", "alpha": 1}], ...}`` or a program (views, base, mix, masks)."""
    if not isinstance(data, Mapping):
        raise UserError("a decoding method is an object with keys", "decode")
    shared = {key: data[key] for key in data if key in SHARED}
    if "methods" in data:
        _only(data, ("methods", *SHARED), "decode")
        entries = data["methods"]
        if not isinstance(entries, list) or not all(isinstance(m, Mapping) and "name" in m for m in entries):
            raise UserError("'methods' is a list of objects with a name", "decode")
        return _from_methods([(str(m["name"]), {k: v for k, v in m.items() if k != "name"}) for m in entries], shared)
    _only(data, (*_PROGRAM, *SHARED), "decode")
    views = tuple(_view(v) for v in data.get("views", ()))
    terms = tuple(_term(t, len(views)) for t in data.get("mix", ()))
    masks = tuple(_op(m, ("mask",)) for m in data.get("masks", ()))
    base = tuple(_op(m, ("model",)) for m in data.get("base", ()))
    for mask in masks:
        if mask.name == "agreement" and mask["view"] > len(views):
            raise UserError(f"agreement names view {mask['view']} of {len(views)}", "decode")
    return _finished(without_idle(DecodeSpec(views=views, base=base, terms=terms, masks=masks)), shared)


def to_object(spec: DecodeSpec, expand: bool) -> dict[str, Any]:
    """The object form of a spec; ``expand`` writes its program even if it came from presets."""
    shared = {k: getattr(spec, k) for k in SHARED if getattr(spec, k) != _default(spec, k)}
    if spec.methods and not expand:
        return {"methods": [{"name": name, **dict(params)} for name, params in spec.methods]} | shared
    shared = {k: getattr(spec, k) for k, p in SHARED.items() if getattr(spec, k) != p.default}
    stages = ("media", "text", "model")
    views = [{s: [_plain(o) for o in getattr(v, s)] for s in stages if getattr(v, s)} for v in spec.views]
    out = {"views": views, "base": [_plain(o) for o in spec.base], "mix": [_plain_term(t) for t in spec.terms]}
    out["masks"] = [_plain(o) for o in spec.masks]
    return {k: v for k, v in out.items() if v} | shared


def to_string(spec: DecodeSpec) -> str:
    """The string form; a program that is no preset is written as JSON."""
    if not spec.methods:
        return json.dumps(to_object(spec, True), ensure_ascii=False)
    items = [[f"{k}={_show(v)}" for k, v in params] for _, params in spec.methods]
    items[-1] += [f"{k}={_show(getattr(spec, k))}" for k in SHARED if getattr(spec, k) != _default(spec, k)]
    return "+".join(name + (":" + ",".join(own) if own else "") for (name, _), own in zip(spec.methods, items))


def _default(spec: DecodeSpec, key: str) -> Any:
    """What the presets alone give a shared field."""
    values = [getattr(preset_of(name)(), key) for name, _ in spec.methods]
    return next((v for v in values if v != SHARED[key].default), SHARED[key].default)


def _from_methods(methods: list[tuple[str, dict[str, Any]]], shared: dict[str, Any]) -> DecodeSpec:
    built = []
    for name, given in methods:
        if not name:
            raise UserError("empty decoding method", do=f"valid: {', '.join(preset_names())}")
        build = preset_of(name)
        valid = inspect.signature(build, eval_str=True).parameters
        values: dict[str, Any] = {}
        for key, value in given.items():
            if key in SHARED:
                shared = {key: value} | shared
                continue
            if key not in valid:
                raise unknown("parameter", key, [*valid, *SHARED], f"decode {name}")
            values[key] = read(value, valid[key].annotation, f"decode {name}: {key}")
        spec = build(**values)
        changed = tuple((k, v) for k, v in values.items() if v != valid[k].default)
        built.append(replace(without_idle(spec), methods=((name, changed),)))
    merged = merge(built)
    for key in SHARED:
        own = [getattr(s, key) for s in built if getattr(s, key) != SHARED[key].default]
        merged = replace(merged, **{key: own[0]}) if own else merged
    return _finished(merged, shared)


def _finished(spec: DecodeSpec, shared: dict[str, Any]) -> DecodeSpec:
    values = {k: checked(v, SHARED[k], f"decode {spec.name}: {k}") for k, v in shared.items()}
    spec = replace(spec, **values)
    if spec.normalize and spec.raw_gain <= 0:
        raise UserError("normalize needs weights with a positive sum", f"decode {spec.name}")
    return spec


def _view(data: Any) -> View:
    if not isinstance(data, Mapping):
        raise UserError("a view is an object with media, text or model", "decode")
    _only(data, _VIEW_STAGES, "decode view")
    return View(**{stage: tuple(_op(o, kinds) for o in data.get(stage, ())) for stage, kinds in _VIEW_STAGES.items()})


def _term(data: Any, views: int) -> Term:
    if not isinstance(data, Mapping) or ("view" in data) == ("tap" in data):
        raise UserError("a term of the mix is an object with either 'view' or 'tap'", "decode mix")
    _only(data, ("view", "tap", "kind", "weight", "rule"), "decode mix")
    kind = data.get("kind", "contrast")
    if kind not in ("contrast", "add"):
        raise unknown("kind", str(kind), ("contrast", "add"), "decode mix")
    weight = read(data.get("weight", 1.0), float, "decode mix: weight")
    rule = _op(data["rule"], ("rule",)) if data.get("rule") else None
    if "tap" in data:
        tap = _tap(data["tap"])
        if rule and rule.name == "probability" and tap.select != "likeliest":
            raise UserError("rule 'probability' needs a tap that selects 'likeliest'", "decode mix")
        return Term(tap, kind, weight, rule)
    if rule and rule.name == "probability":
        raise UserError("rule 'probability' needs a tap", "decode mix")
    source = read(data["view"], int, "decode mix: view")
    if not 1 <= source <= views:
        raise UserError(f"view {source} is not in 1..{views}", "decode mix", "count the further views from 1")
    return Term(source, kind, weight, rule)


def _tap(data: Any) -> Tap:
    _only(data, ("layers", "select", "norm"), "decode tap")
    select = data.get("select", "divergent")
    if select not in get_args(Select):
        raise unknown("selection", str(select), get_args(Select), "decode tap")
    layers = str(data.get("layers", "high"))
    check_layers(layers, "decode tap: layers")
    return Tap(layers, select, read(data.get("norm", True), bool, "decode tap: norm"))


def _op(data: Any, stages: tuple[str, ...]) -> Op:
    data = {"name": data} if isinstance(data, str) else data
    if not isinstance(data, Mapping) or "name" not in data:
        raise UserError("an operation is a name, or an object with a name and its parameters", "decode")
    return op(str(data["name"]), stages, **{k: v for k, v in data.items() if k != "name"})


def _plain(o: Op) -> Any:
    params = OPS[o.name].params
    changed = {k: v for k, v in o.args if v != params[k].default}
    return {"name": o.name, **changed} if changed else o.name


def _plain_term(term: Term) -> dict[str, Any]:
    out: dict[str, Any] = {"view": term.source}
    if isinstance(term.source, Tap):
        out = {"tap": {"layers": term.source.layers, "select": term.source.select, "norm": term.source.norm}}
    return out | {"kind": term.kind, "weight": term.weight} | ({"rule": _plain(term.rule)} if term.rule else {})


def _only(data: Any, valid: Any, where: str) -> None:
    for key in data:
        if key not in valid:
            raise unknown("key", str(key), valid, where)


def _split(text: str, mark: str) -> list[str]:
    """Parts between marks that stand outside double quotes, without empty ones."""
    found = re.findall(rf'(?:"[^"]*"|[^"{re.escape(mark)}])+', text)
    return [part.strip() for part in found if part.strip()]


def _load(path: Path) -> Any:
    import yaml

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        raise UserError(f"cannot be read: {str(e).splitlines()[0]}", path, "give a YAML or JSON file") from None


def _show(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return repr(int(value)) if value == int(value) and abs(value) < 1e15 else repr(value)
    return f'"{value}"' if isinstance(value, str) and re.search(r'[,+"=]|^\s|\s$', value) else str(value)
