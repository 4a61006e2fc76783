"""The registry: names to objects, nearest names in errors, third-party packages by entry point."""

from __future__ import annotations

import importlib

import pytest

from mmllm import registry
from mmllm.errors import UserError


@pytest.fixture(autouse=True)
def empty_registry(monkeypatch):
    """A registry of its own for each test, with plugins not looked for yet and the library of methods left out."""
    monkeypatch.setattr(registry, "_methods_loaded", True)
    monkeypatch.setattr(registry, "_REGISTRY", {})
    monkeypatch.setattr(registry, "_plugins_loaded", False)


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """``plugin(name, code)`` installs a package that names a module in the group ``mmllm.plugins``."""

    def install(name: str, code: str) -> None:
        (tmp_path / f"{name}.py").write_text(code)
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[mmllm.plugins]\n{name} = {name}\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        importlib.invalidate_caches()

    return install


def test_register_and_get():
    @registry.register("objective", "mine")
    class Mine: ...

    assert registry.get("objective", "mine") is Mine
    registry.register("objective", "also")(Mine)
    assert registry.names("objective") == ["also", "mine"]
    assert registry.names("sampler") == []


def test_unknown_name_gives_the_nearest_and_the_place():
    registry.register("objective", "infonce")(type("A", (), {}))
    with pytest.raises(UserError, match=r"^align.yaml: unknown objective 'infonec'; did you mean 'infonce'\?$"):
        registry.get("objective", "infonec", "align.yaml")
    with pytest.raises(UserError, match="^unknown sampler 'x'; valid: none$"):
        registry.get("sampler", "x")


def test_a_name_is_held_by_one_object_only():
    class First: ...

    class Second: ...

    registry.register("objective", "x")(First)
    registry.register("objective", "x")(First)  # the same class again, as when a module is reloaded
    with pytest.raises(ValueError, match="objective 'x' is already registered by .*First"):
        registry.register("objective", "x")(Second)
    assert registry.get("objective", "x") is First


def test_plugin_of_a_third_party(plugin):
    plugin(
        "mmllm_third_party",
        "from mmllm.registry import register\n@register('objective', 'theirs')\nclass Theirs: ...\n",
    )
    assert registry.get("objective", "theirs").__name__ == "Theirs"
    assert registry.names("objective") == ["theirs"]


def test_broken_plugin_is_named(plugin):
    plugin("mmllm_broken", "import a_module_that_is_not_there\n")
    with pytest.raises(UserError, match="plugin 'mmllm_broken' .*a_module_that_is_not_there.*uninstall"):
        registry.names("objective")


def test_known_names_do_not_wait_for_plugins(plugin):
    plugin("mmllm_broken_too", "raise RuntimeError('must not be imported')\n")
    registry.register("objective", "x")(type("A", (), {}))
    registry.get("objective", "x")
