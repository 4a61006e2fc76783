"""One file per published method, and their cards: what each file says of itself, read without running it.

A method file begins with its card, its docstring: a first line with title and arXiv number, and then YAML with the keys
``slug``, ``number`` (of the catalogue), ``shelf``, ``kind``, ``config`` (lines that switch it on), ``left_out`` and,
where released code differs from the paper, ``differs``.
"""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from mmllm.errors import UserError, unknown

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
        config: lines of an align config that switch it on.
        left_out: what of the paper is not here, and why.
        differs: where released code does something else than this file, which follows the paper.
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

    @property
    def module(self) -> str:
        """The module that registers what the card's config names."""
        return f"{__name__}.{module_name(self.slug)}"


def module_name(slug: str) -> str:
    """``grad-harmonize`` -> ``grad_harmonize``, the name of its file."""
    return slug.replace("-", "_")


def cards() -> list[Card]:
    """The cards of all methods here, by number of the catalogue."""
    return sorted((read_card(f) for f in files()), key=lambda c: c.number)


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


def read_card(file: Path) -> Card:
    """The card of a method file; nothing of it is run.

    Raises:
        UserError: no card, or one that is not as described above.
    """
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    first, _, rest = text.partition("\n")
    head = ARXIV.match(first.strip())
    try:
        body = yaml.safe_load(rest) or {}
        if head is None or not isinstance(body, dict):
            raise ValueError("its first line is no 'Title (arXiv NUMBER)'")
        made = Card(title=head["title"], arxiv=head["arxiv"], **body)
    except (yaml.YAMLError, TypeError, ValueError) as e:
        raise UserError(f"this method has no proper card: {' '.join(str(e).split())}", file) from None
    if module_name(made.slug) != file.stem or made.kind not in KINDS:
        raise UserError(f"the card's slug '{made.slug}' or kind '{made.kind}' does not fit", file)
    return made


def load_methods() -> None:
    """Imports every method, which registers what it brings."""
    for file in files():
        importlib.import_module(f"{__name__}.{file.stem}")
