"""Fetches a recipe's sources into the cache, each checked by sha256; says what was used, what is missing and why."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from importlib import metadata, util
from pathlib import Path
from typing import Any, Literal

from mmllm.config import StrictModel, find_config, parse_config
from mmllm.data.cache import (
    DOWNLOADS,
    cache_root,
    entry_path,
    human,
    install,
    is_whole,
    locked,
    require_space,
    sha256_file,
)
from mmllm.data.fetch import Refused, Unavailable, fetch_apt, fetch_npm, fetch_pip
from mmllm.data.fetch.common import say
from mmllm.data.fetch.unpack import unpack
from mmllm.errors import UserError

RECIPES = Path(__file__).parent.parent / "data_recipes"
STARTER = "starter.yaml"
UNPACK_FACTOR = 3  # the archive beside its unpacked files, with room for the worst of the starter's sources
APT_STATE = "apt-lists"
KIND = {"pip": "wheels", "npm": "npm", "apt": "deb"}  # folder of the cache
TOOL = {"pip": "pip", "npm": "npm", "apt": "apt-get"}


class Source(StrictModel):
    """One entry of a recipe's ``sources``: a pinned package, how it is fetched and what it may be used for."""

    via: Literal["pip", "npm", "apt", "installed"]
    package: str
    version: str = ""
    sha256: str = ""
    bytes: int = 0
    licence: str
    credit: str = ""
    role: Literal["data", "model"] = "data"
    keep: list[str] = []
    root: str = ""
    required: bool | None = None  # default: pip and installed are, npm and apt are not

    @property
    def is_required(self) -> bool:
        return self.via in ("pip", "installed") if self.required is None else self.required


class _Sources(StrictModel):
    sources: dict[str, Source]


@dataclass
class FetchReport:
    """What ``fetch_sources`` found: folders by source name; what results must name; what is missing and why."""

    paths: dict[str, Path] = field(default_factory=dict)
    used: list[dict[str, str]] = field(default_factory=list)
    missing: list[dict[str, str]] = field(default_factory=list)


def load_recipe(path: str | Path = STARTER) -> dict[str, Any]:
    """A data recipe as a dict: a path of the user's, or the name of a packaged one.

    Raises:
        UserError: no such file, or not YAML.
    """
    import yaml

    file = find_config(path, RECIPES)
    try:
        data = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        mark = getattr(e, "problem_mark", None)
        raise UserError("not valid YAML", f"{file}:{mark.line + 1}" if mark else file) from None
    if not isinstance(data, dict):
        raise UserError("a data recipe is a mapping of keys", file)
    return data


def sources_of(recipe: dict[str, Any]) -> dict[str, Source]:
    """The recipe's section ``sources``, checked.

    Raises:
        UserError: an unknown key or a missing one.
    """
    parsed = parse_config({"sources": recipe.get("sources") or {}}, _Sources, "data recipe").sources
    for name, source in parsed.items():
        if source.via != "installed" and (len(source.sha256) != 64 or not source.version):
            raise UserError("a fetched source needs version and sha256", f"sources.{name}", "pin it")
    return parsed


def fetch_sources(recipe: dict[str, Any], offline: bool = False, only: list[str] | None = None) -> FetchReport:
    """Fetches every source of the recipe that the cache does not hold yet.

    Args:
        recipe: a data recipe with a section ``sources``.
        offline: touch no network; what the cache does not hold is missing.
        only: these source names, instead of all.

    Raises:
        UserError: a required source cannot be had, a file is not the pinned one, the disk is full. Nothing half-written
            is left behind; sources that were complete stay cached.
    """
    sources = sources_of(recipe)
    if only is not None:
        sources = {name: sources[name] for name in only}
    report = FetchReport()
    absent = {n: s for n, s in sources.items() if s.via != "installed" and cached(s) is None}
    if absent and not offline:
        total = sum(s.bytes for s in absent.values())
        require_space(total * UNPACK_FACTOR)
        say(f"fetching {len(absent)} sources, {human(total)}, into {cache_root()}")
    broken: dict[str, str] = {}  # a program that cannot work here, and why: not tried again for every source
    try:
        for name, source in sources.items():
            try:
                path, version, sha256 = _get(name, source, offline, broken)
            except Unavailable as e:
                if e.whole_tool:
                    broken[source.via] = str(e)
                if source.is_required:
                    raise UserError(
                        f"cannot fetch {source.package} {source.version}: {e}",
                        f"source '{name}'",
                        _advice(source, offline),
                    ) from None
                report.missing.append({"name": name, "why": str(e)})
                continue
            report.paths[name] = path / source.root
            report.used.append(
                {"name": name, "version": version, "licence": source.licence, "sha256": sha256, "via": source.via}
            )
    finally:
        _drop_apt_lists()
    if report.missing:
        for item in report.missing:
            say(f"WARNING: source '{item['name']}' is missing: {item['why']}")
        say(
            f"WARNING: going on without {len(report.missing)} of {len(sources)} sources: "
            "fewer kinds of pictures and sounds; every result will say so"
        )
    return report


def _drop_apt_lists() -> None:
    """Package lists age within days: each fetch gets its own."""
    lists = cache_root() / DOWNLOADS / APT_STATE
    if lists.exists():
        with locked("apt"):
            shutil.rmtree(lists, ignore_errors=True)


def _advice(source: Source, offline: bool) -> str:
    if offline:
        return "run once without --offline"
    if source.via == "installed":
        return f"pip install {source.package}"
    return f"check the network and {TOOL[source.via]}'s settings, then run it again"


def cached(source: Source) -> Path | None:
    """The source's whole folder in the cache, if it is there."""
    path = entry_path(KIND[source.via], source.package, source.version, source.sha256)
    if is_whole(path):
        return path
    if source.via == "apt":  # another release's build of the same package counts too
        others = sorted(p for p in path.parent.glob(f"{source.package}-*") if is_whole(p))
        return others[-1] if others else None
    return None


def _get(name: str, source: Source, offline: bool, broken: dict[str, str]) -> tuple[Path, str, str]:
    """Folder, version and sha256 of one source, from the cache or fetched.

    Raises:
        Unavailable: it cannot be had.
        UserError: a wrong file came, or it cannot be written.
    """
    if source.via == "installed":
        return _installed(source)
    path = cached(source)
    if path is None:
        if offline:
            raise Unavailable("not in the cache, and --offline was given")
        if source.via in broken:
            raise Unavailable(broken[source.via])
        say(f"  {name}: {source.package} {source.version} ({human(source.bytes)}) by {TOOL[source.via]}")
        path = _fetch(name, source)
    label = path.name.removeprefix(entry_path("x", source.package, "", "").name.rstrip("-") + "-")
    version = label.rpartition("-")[0]
    return path, version, source.sha256 if version == source.version else label.rpartition("-")[2]


def _installed(source: Source) -> tuple[Path, str, str]:
    spec = util.find_spec(source.package.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise Unavailable(f"the Python package {source.package} is not installed")
    return Path(spec.submodule_search_locations[0]), metadata.version(source.package), ""


def _fetch(name: str, source: Source) -> Path:
    """Downloads aside, checks, unpacks into the cache; the download itself is not kept."""
    root = cache_root()
    with locked(f"fetch-{name}"):
        found = cached(source)
        if found is not None:
            return found
        folder, version = root / DOWNLOADS / name, source.version
        try:
            try:
                shutil.rmtree(folder, ignore_errors=True)  # of a killed process
                folder.mkdir(parents=True)
                if source.via == "pip":
                    archive = fetch_pip(source.package, version, source.sha256, folder)
                elif source.via == "npm":
                    archive = fetch_npm(source.package, version, folder)
                else:
                    with locked("apt"):
                        archive = fetch_apt(source.package, version, folder, root / DOWNLOADS / APT_STATE)
                    version = archive.name.split("_")[1].replace("%3a", ":")
                sha256 = sha256_file(archive)
                if version != source.version:
                    say(
                        f"WARNING: source '{name}': this system carries {version}, not {source.version}; "
                        "figures may differ a little"
                    )
                elif sha256 != source.sha256:
                    raise Refused(f"sha256 is {sha256[:12]}…, expected {source.sha256[:12]}…")
            except Refused as e:
                raise UserError(
                    f"the downloaded {source.package} {source.version} is not the pinned file ({e}); refused",
                    f"source '{name}'",
                    f"run it again in case it was cut off, else check which index {TOOL[source.via]} uses here",
                ) from None
            except OSError as e:
                raise UserError(
                    f"cannot write the download: {e.strerror or e}",
                    root,
                    "free some space, or set MMLLM_CACHE to another folder",
                ) from None

            def make(part: Path) -> None:
                try:
                    count = unpack(archive, part, source.keep)
                except ValueError as e:
                    raise Unavailable(str(e)) from None
                if not count or not (part / source.root).is_dir():
                    raise Unavailable(f"{archive.name} does not hold {source.root or 'any file'}")

            return install(
                KIND[source.via], source.package, version, sha256, make, needs_bytes=source.bytes * UNPACK_FACTOR
            )
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def licences(recipe: dict[str, Any]) -> list[dict[str, str]]:
    """One row a source: name, package, version, via, role, licence, credit."""
    keys = ("package", "version", "via", "role", "licence", "credit")
    return [{"name": n, **{k: str(getattr(s, k)) for k in keys}} for n, s in sources_of(recipe).items()]


def licences_markdown(recipe: dict[str, Any]) -> str:
    """The same as a Markdown table, for the docs."""
    head = "| source | package | by | licence | credit |\n|---|---|---|---|---|\n"
    rows = [
        f"| {r['name']} | {r['package']} {r['version']} | {r['via']} | {r['licence']} | {r['credit']} |"
        for r in licences(recipe)
    ]
    return head + "\n".join(rows) + "\n"
