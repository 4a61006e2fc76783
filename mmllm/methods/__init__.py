"""One file per published method, and their cards: what each file says of itself, read without running it.

A method file begins with its card, its docstring: a first line with title and arXiv number, and then YAML with the keys
``slug``, ``number`` (of the catalogue), ``shelf``, ``kind``, ``config`` (lines that switch it on), ``left_out`` and,
where released code differs from the paper, ``differs``. A module of another package that an entry point in the group
``mmllm.plugins`` names is a method, too, when it begins with such a card.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import yaml

from mmllm.errors import UserError, unknown
from mmllm.registry import ENTRY_POINT_GROUP

FOLDER = Path(__file__).parent
KINDS = (
    "objective",
    "head",
    "batch_sampler",
    "transform",
    "input_transform",
    "data_recipe",
    "step_hook",
    "scorer",
    "connector",
    "measure",
    "recipe",
)
ARXIV = re.compile(r"^(?P<title>.+?) \(arXiv (?P<arxiv>\d{4}\.\d{4,5})\)\.?$")


@dataclass(frozen=True)
class Card:
    """What a method file says of itself.

    Attributes:
        shelf: which part of the library it belongs to.
        config: lines of an align config that switch it on.
        left_out: what of the paper is not here, and why.
        differs: where released code does something else than this file, which follows the paper.
        file, module: where it stands.
    """

    slug: str
    number: int
    shelf: int
    title: str
    arxiv: str
    kind: str
    config: str
    left_out: str
    differs: str = ""
    file: Path = FOLDER
    module: str = ""

    @property
    def effect(self) -> Path | None:
        """The effect config that a method of another package brings: ``effects/SLUG.yaml`` beside its module."""
        beside = self.file.parent / "effects" / f"{self.slug}.yaml"
        return beside if self.file.parent != FOLDER and beside.is_file() else None


def module_name(slug: str) -> str:
    """``grad-harmonize`` -> ``grad_harmonize``, the name of its file."""
    return slug.replace("-", "_")


def cards() -> list[Card]:
    """The cards of all methods, by number of the catalogue; those of other packages come last."""
    own = sorted((read_card(f) for f in files()), key=lambda c: c.number)
    return own + sorted(plugin_cards(), key=lambda c: c.slug)


def plugin_cards() -> Iterator[Card]:
    """The cards of plugins' modules; none of them is run."""
    for entry in metadata.entry_points(group=ENTRY_POINT_GROUP):
        name = entry.value.partition(":")[0]
        parent = name.partition(".")[0]
        with contextlib.suppress(ImportError, ValueError):
            # A submodule's own spec would import its package, which may be heavy; its file stands below the package's.
            spec = importlib.util.find_spec(parent)
            roots = [Path(p) for p in (spec.submodule_search_locations or ())] if spec else []
            tail = name.split(".")[1:]
            options = [r.joinpath(*tail).with_suffix(".py") for r in roots if tail]
            options += [Path(spec.origin)] if spec and spec.origin and not tail else []
            for file in options:
                if file.is_file() and ARXIV.match((docstring(file).partition("\n")[0]).strip()):
                    yield read_card(file, name)


def card(slug: str) -> Card:
    """The card of one method.

    Raises:
        UserError: no such method; the nearest one is named.
    """
    found = {c.slug: c for c in cards()}
    if slug not in found:
        raise unknown("method", slug, found)
    return found[slug]


def files() -> Iterator[Path]:
    """The method files."""
    return (f for f in sorted(FOLDER.glob("*.py")) if not f.name.startswith("_"))


def docstring(file: Path) -> str:
    """What a Python file begins with."""
    return ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""


def read_card(file: Path, module: str = "") -> Card:
    """The card of a method file; nothing of it is run.

    Args:
        module: its name, for a file of another package.

    Raises:
        UserError: no card, or one that is not as described above.
    """
    first, _, rest = docstring(file).partition("\n")
    head = ARXIV.match(first.strip())
    try:
        body = yaml.safe_load(rest) or {}
        if head is None or not isinstance(body, dict):
            raise ValueError("its first line is no 'Title (arXiv NUMBER)'")
        body.setdefault("number", 0)
        body.setdefault("shelf", 0)
        at = {"file": file, "module": module or f"{__name__}.{file.stem}"}
        made = Card(title=head["title"], arxiv=head["arxiv"], **body, **at)
    except (yaml.YAMLError, TypeError, ValueError) as e:
        raise UserError(f"this method has no proper card: {' '.join(str(e).split())}", file) from None
    if module_name(made.slug) != file.stem or made.kind not in KINDS:
        raise UserError(f"the card's slug '{made.slug}' or kind '{made.kind}' does not fit", file)
    return made


def load_methods() -> None:
    """Imports every method, which registers what it brings."""
    for file in files():
        importlib.import_module(f"{__name__}.{file.stem}")
