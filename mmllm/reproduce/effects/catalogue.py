"""The library of methods as a table: each card with its verdict, for `mmllm methods` and docs/methods.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mmllm
from mmllm.methods import Card, cards

# What the library is best read by.
NAMES = {"objective": "loss", "head": "head", "connector": "head", "batch_sampler": "batches", "data_recipe": "data",
         "step_hook": "training step", "scorer": "similarity", "transform": "augmentation",
         "input_transform": "augmentation", "measure": "measure", "recipe": "recipe"}  # fmt: skip
WORDS = {"shown": "shown", "noise": "within noise", "opposite": "opposite"}


def verdicts(file: Path | None = None) -> dict[str, dict[str, Any]]:
    """Slug -> its figure in effects.json; of ``docs/`` here, else the one that came with mmllm; empty without any."""
    package = Path(mmllm.__file__).parent
    for place in [file] if file else [Path("docs/effects.json"), package.parent / "docs/effects.json",
                                      package / "docs/effects.json"]:  # fmt: skip
        if place.is_file():
            return {f["name"]: f for f in json.loads(place.read_text(encoding="utf-8"))["figures"]}
    return {}


def verdict_of(figure: dict[str, Any] | None) -> str:
    """``shown 0.17 (0.04 … 0.30)``, or a dash for a method whose effect was not run."""
    if figure is None or figure.get("value") is None:
        return "-"
    bounds = f" ({figure['low']:.3g} … {figure['high']:.3g})" if figure.get("low") is not None else ""
    return f"{WORDS[figure['verdict']]} {figure['value']:.3g}{bounds}"


def table() -> list[list[str]]:
    """Rows of slug, kind, title and verdict."""
    held = verdicts()
    return [[c.slug, NAMES.get(c.kind, c.kind), c.title, verdict_of(held.get(c.slug))] for c in cards()]


def description(one: Card) -> list[tuple[str, str]]:
    """What a card says, as headed lines."""
    figure = verdicts().get(one.slug)
    lines = [
        ("method", f"{one.title} (arXiv {one.arxiv})"),
        ("kind", NAMES.get(one.kind, one.kind)),
        ("switch on", one.config),
        ("left out", one.left_out),
        ("differs from released code", one.differs),
        ("file", str(one.file)),
        ("effect", f"mmllm reproduce {one.slug}"),
        ("verdict", verdict_of(figure)),
        ("measured", (figure or {}).get("note") or ""),
    ]
    return [(k, " ".join(v.split()) if k != "switch on" else v.strip()) for k, v in lines if v]


def page(held: dict[str, dict[str, Any]] | None = None) -> str:
    """docs/methods.md."""
    held = verdicts() if held is None else held
    own = [c for c in cards() if c.module.startswith("mmllm.")]
    lines = [
        "# The library of methods",
        "",
        "Written by `mmllm methods list --markdown docs/methods.md` from the cards on top of the files in"
        " `mmllm/methods/`. `mmllm methods show SLUG` shows one, `mmllm reproduce SLUG` its effect;"
        " [effects.md](effects.md) has all of them with what was measured.",
        "",
        "| method | kind | effect |",
        "|---|---|---|",
    ]
    for c in own:
        effect = verdict_of(held.get(c.slug))
        lines.append(f"| [`{c.slug}`](#{c.slug}) {c.title} | {NAMES.get(c.kind, c.kind)} | {effect} |")
    for c in own:
        lines += ["", f"## {c.slug}", "", f"{c.title}, [arXiv {c.arxiv}](https://arxiv.org/abs/{c.arxiv}).", ""]
        lines += ["```yaml", c.config.strip(), "```", "", f"Left out: {' '.join(c.left_out.split())}"]
        if c.differs:
            lines += ["", f"Differs from released code: {' '.join(c.differs.split())}"]
    return "\n".join(lines) + "\n"
