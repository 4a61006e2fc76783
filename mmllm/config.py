"""Strict typed configs: YAML merged by OmegaConf with key=value overrides, validated by pydantic, dumped resolved."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin

import pydantic
import yaml

from mmllm.errors import UserError, nearest

PACKAGED = Path(__file__).parent / "configs"
T = TypeVar("T", bound="StrictModel")


class StrictModel(pydantic.BaseModel):
    """Base of every config section: an unknown key is an error."""

    model_config = pydantic.ConfigDict(extra="forbid", validate_assignment=True, protected_namespaces=())


def find_config(name: str | Path, packaged: Path = PACKAGED) -> Path:
    """The config file: a path of the user's, or the same relative path inside the installed package.

    ``configs/starter/align.yaml``, ``starter/align.yaml`` and ``starter/align`` all find the packaged file when no
    local file has that name.

    Raises:
        UserError: no such file.
    """
    path = Path(name)
    if path.is_file():
        return path
    tail = Path(*path.parts[1:]) if path.parts and path.parts[0] == packaged.name else path
    for candidate in (packaged / tail, packaged / f"{tail}.yaml"):
        if candidate.is_file() and not path.is_absolute():
            return candidate
    known = sorted(str(p.relative_to(packaged).with_suffix("")) for p in packaged.rglob("*.yaml"))
    near = nearest(str(tail.with_suffix("")), known)
    raise UserError("no such config file", name, f"did you mean '{near}'?" if near else f"packaged: {', '.join(known)}")


def _children(annotation: Any) -> list[type[StrictModel]]:
    """The config sections that an annotation may hold."""
    if isinstance(annotation, type) and issubclass(annotation, StrictModel):
        return [annotation]
    if get_origin(annotation) is not None or get_origin(annotation) is Union:
        return [m for a in get_args(annotation) for m in _children(a)]
    return []


def _valid_keys(schema: type[StrictModel], loc: tuple[Any, ...]) -> list[str]:
    """Keys that are valid beside the last element of ``loc``."""
    models = [schema]
    for part in loc[:-1]:
        below: list[type[StrictModel]] = []
        for m in models:
            if isinstance(part, str) and part in m.model_fields:
                below += _children(m.model_fields[part].annotation)
        models = below or models
    keys = {k for m in models for k in m.model_fields}
    return sorted(keys | {k for m in models for k in getattr(m, "extra_keys", tuple)()})


def _explain(error: pydantic.ValidationError, schema: type[StrictModel], source: object) -> UserError:
    """The weightiest problem of a validation, as one line with file and key."""
    errors = error.errors()
    # A mistyped key comes before the "missing" one that it was meant to be.
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    loc = first["loc"]
    key = ".".join(str(p) for p in loc)
    if first["type"] == "extra_forbidden":
        valid = _valid_keys(schema, loc)
        near = nearest(str(loc[-1]), valid)
        do = f"did you mean '{near}'?" if near else f"valid here: {', '.join(valid)}"
        return UserError(f"unknown key '{key}'", source, do)
    if first["type"] == "missing":
        return UserError(f"missing key '{key}'", source, "add it to the file or give it as key=value")
    message = first["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    given = repr(first.get("input"))
    if not key or len(given) > 80:
        return UserError(f"key '{key}': {message}" if key else message, source)
    return UserError(f"key '{key}': {message} (got {given})", source)


def parse_config(data: dict[str, Any], schema: type[T], source: object = "config") -> T:
    """Validates a plain dict.

    Raises:
        UserError: names the key, the source and, for an unknown key, the nearest valid one.
    """
    try:
        return schema.model_validate(data)
    except pydantic.ValidationError as e:
        raise _explain(e, schema, source) from None
    except UserError as e:  # raised by a section's own check
        raise UserError(e.what, source if e.where is None else f"{source}: {e.where}", e.do) from None


def load_config(
    path: str | Path, overrides: list[str] | tuple[str, ...], schema: type[T], resolve: bool = True
) -> T:
    """Reads a YAML config, applies ``key=value`` overrides (dots go deeper, numbers into lists), validates it.

    Args:
        resolve: False leaves ``${...}`` as it stands, for a config whose parts become others' configs.

    Raises:
        UserError: unreadable YAML (with its line), a malformed override, an unknown key or a bad value.
    """
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    file = find_config(path)
    try:
        # OmegaConf's loader, unlike plain YAML, reads 1e-3 as a number and refuses a key given twice.
        config = OmegaConf.create(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        where = f"{file}:{mark.line + 1}" if mark else file
        raise UserError(f"not valid YAML ({getattr(e, 'problem', None) or 'syntax'})", where) from None
    except UnicodeDecodeError:
        raise UserError("not a text file", file, "give a YAML config") from None
    if not isinstance(config, DictConfig):
        raise UserError("a config is a mapping of keys", file)
    for item in overrides:
        key, equals, _ = item.partition("=")
        if not key or not equals:
            raise UserError(f"override '{item}' is not key=value", do="write e.g. train.max_steps=100")
        try:
            value = OmegaConf.from_dotlist([f"value={item.partition('=')[2]}"])["value"]
            OmegaConf.update(config, key, value, merge=True, force_add=True)
        except (OmegaConfBaseException, yaml.YAMLError, ValueError, TypeError) as e:
            raise UserError(f"override '{item}': {str(e).splitlines()[0]}", file) from None
    try:
        data = OmegaConf.to_container(config, resolve=resolve)
    except OmegaConfBaseException as e:
        raise UserError(str(e).splitlines()[0], file, "check the interpolations") from None
    return parse_config(data, schema, file)  # type: ignore[arg-type]


def dump_config(config: StrictModel, path: str | Path) -> None:
    """Writes the resolved config: enough to run the same thing again (nulls too: one may differ from its default)."""
    data = config.model_dump(mode="json")
    Path(path).write_text(yaml.safe_dump(data, sort_keys=False, allow_unicode=True), encoding="utf-8")
