"""Names for the things a config can choose: objectives, samplers, tasks, methods; third parties join by entry point."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from importlib import metadata
from typing import Any, TypeVar

from mmllm.errors import UserError, unknown

ENTRY_POINT_GROUP = "mmllm.plugins"
LIBRARY = "mmllm.methods"  # found as a plugin is, by name: the rooms below it must not import it
_REGISTRY: dict[str, dict[str, Any]] = {}
_methods_loaded = _plugins_loaded = False
T = TypeVar("T")


def register(kind: str, name: str) -> Callable[[T], T]:
    """Class or function decorator: makes the object available as ``get(kind, name)``.

    Raises:
        ValueError: another object already holds the name.
    """

    def add(thing: T) -> T:
        held = _REGISTRY.setdefault(kind, {}).get(name)
        if held is not None and (held.__module__, held.__qualname__) != (thing.__module__, thing.__qualname__):  # type: ignore[attr-defined]
            raise ValueError(f"{kind} '{name}' is already registered by {held.__module__}.{held.__qualname__}")
        _REGISTRY[kind][name] = thing
        return thing

    return add


def load_methods(kind: str) -> None:
    """Imports the library of methods, once, if it may have something of this kind (decoders are not in it)."""
    global _methods_loaded
    if _methods_loaded:
        return
    library = importlib.import_module(LIBRARY)
    if kind in library.KINDS:
        _methods_loaded = True
        library.load_methods()


def load_plugins() -> None:
    """Imports every module that an installed package names in the entry point group ``mmllm.plugins``, once.

    Raises:
        UserError: a plugin cannot be imported.
    """
    global _plugins_loaded
    if _plugins_loaded:
        return
    _plugins_loaded = True
    for entry in metadata.entry_points(group=ENTRY_POINT_GROUP):
        try:
            entry.load()
        except Exception as e:
            what = f"plugin '{entry.name}' ({entry.value}) cannot be loaded: {e}"
            raise UserError(what, do="mend it or uninstall its package") from e


def get(kind: str, name: str, where: object | None = None) -> Any:
    """The object registered under ``name``: by the core, by a method of the library, or by a third party.

    Raises:
        UserError: no such name; the message gives the nearest valid one.
    """
    if name not in _REGISTRY.get(kind, {}):
        load_methods(kind)
    if name not in _REGISTRY.get(kind, {}):
        load_plugins()
    try:
        return _REGISTRY[kind][name]
    except KeyError:
        raise unknown(kind, name, _REGISTRY.get(kind, {}), where) from None


def make(kind: str, spec: str | dict[str, Any], where: object | None = None) -> Any:
    """An object of a registered class, from its name or ``{"type": NAME, **options}``; it knows its ``name``.

    Raises:
        UserError: unknown name or option, or one that is missing.
    """
    options = {"type": spec} if isinstance(spec, str) else dict(spec)
    name = str(options.pop("type", ""))
    cls = get(kind, name, where)
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    valid = [n for n, p in inspect.signature(cls).parameters.items() if p.kind in named]
    for key in options:
        if key not in valid:
            raise unknown("option", key, valid, f"{kind.replace('_', ' ')} '{name}'")
    try:
        made = cls(**options)
    except TypeError as e:
        raise UserError(str(e).split("() ")[-1], f"{kind.replace('_', ' ')} '{name}'") from None
    if not getattr(made, "name", None):
        made.name = name
    return made


def names(kind: str) -> list[str]:
    """All names of one kind, sorted, plugins included."""
    load_methods(kind)
    load_plugins()
    return sorted(_REGISTRY.get(kind, {}))
