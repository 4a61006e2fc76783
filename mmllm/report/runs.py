"""The page of a training run, or of several side by side: curves, figures, settings that differ, nearest neighbours."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmllm.errors import UserError
from mmllm.report.figures import Figure, number, read_figures
from mmllm.report.html import curve_svg, data_uri, esc, figures_html, metric_rows, page, picture_uri
from mmllm.report.plots import heat_svg

# Entries of metrics.jsonl that are no measurements.
_NOT_DRAWN = {"step", "epoch", "phase", "time", "total_flos"}


def run_curves(run: Path) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """(phase, entry) -> [(step, value)] of every number in a run's ``metrics.jsonl``."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in metric_rows(run / "metrics.jsonl"):
        for key, value in row.items():
            drawn = isinstance(value, int | float) and not isinstance(value, bool) and key not in _NOT_DRAWN
            if drawn and not key.startswith("train_"):
                found.setdefault((str(row.get("phase") or ""), key), []).append((float(row["step"]), float(value)))
    return found


def write_run_report(runs: Sequence[Path], path: Path) -> Path:
    """Writes one self-contained page about one run, or comparing several.

    Raises:
        UserError: a folder that is no run.
    """
    for run in runs:
        if not (run / "run.json").is_file():
            raise UserError(
                "no run folder (it has no run.json)", run, "give a folder that align, pretrain or tune made"
            )
    names = _names(runs)
    sections = [("Runs", _about(runs, names))]
    if len(runs) > 1:
        sections.append(("Settings that differ", _settings(runs, names)))
    figures = {name: _figures(run) for name, run in zip(names, runs)}
    if any(figures.values()):
        only = figures_html(next(iter(figures.values())))
        sections.append(("Figures", only if len(runs) == 1 else _side_by_side(figures)))
    plots = _plots({name: run_curves(run) for name, run in zip(names, runs)})
    if plots:
        sections.append(("Curves", f'<div class="plots">{"".join(plots)}</div>'))
    for name, run in zip(names, runs):
        sections += _neighbours(run, f" ({name})" if len(runs) > 1 else "")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(" · ".join(names), sections), encoding="utf-8")
    return path


def _names(runs: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell the runs apart."""
    parts = [run.resolve().parts for run in runs]
    for n in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-n:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [str(run) for run in runs]


def _about(runs: Sequence[Path], names: Sequence[str]) -> str:
    infos = [json.loads((run / "run.json").read_text(encoding="utf-8")) for run in runs]
    keys = [k for k in ("stage", "command", "status", "seed", "started", "finished", "seconds")
            if any(k in info for info in infos)]  # fmt: skip
    return _table(["", *names], [[k, *(str(info.get(k, "")) for info in infos)] for k in keys])


def _settings(runs: Sequence[Path], names: Sequence[str]) -> str:
    import yaml

    configs = []
    for run in runs:
        file = run / "config.yaml"
        configs.append(_flat(yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}))
    keys = [k for k in dict.fromkeys(k for c in configs for k in c) if len({str(c.get(k)) for c in configs}) > 1]
    rows = [[k, *(str(c.get(k, "—")) for c in configs)] for k in keys]
    return _table(["key", *names], rows) if rows else '<p class="small">The configs are equal.</p>'


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; lists stay whole."""
    if not isinstance(value, Mapping):
        return {prefix: value}
    out: dict[str, Any] = {}
    for key, inner in value.items():
        out |= _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    return out


def _figures(run: Path) -> list[Figure]:
    found: list[Figure] = []
    for file in (run / "final" / "results.json", run / "eval" / "results.json"):
        found += read_figures(file) if file.is_file() else []
    return found


def _side_by_side(figures: Mapping[str, Sequence[Figure]]) -> str:
    by_name = {name: {f.name: f for f in found} for name, found in figures.items()}
    rows = []
    for key in dict.fromkeys(f.name for found in figures.values() for f in found):
        cells = []
        for found in by_name.values():
            f = found.get(key)
            if f is None or f.value is None:
                cells.append("")
                continue
            bounds = "" if f.low is None else f" ({number(f.low, f.unit)} … {number(f.high, f.unit)})"
            cells.append(number(f.value, f.unit) + bounds)
        rows.append([key, *cells])
    return _table(["figure", *figures], rows)


def _plots(curves: Mapping[str, Mapping[tuple[str, str], list[tuple[float, float]]]]) -> list[str]:
    """One plot per phase and entry, a line per run; entries of one run alone share no plot."""
    plots = []
    for phase, key in dict.fromkeys(k for found in curves.values() for k in found):
        # A single run's lines are called by what they measure, several by their run.
        named = {(name if len(curves) > 1 else key): found.get((phase, key)) for name, found in curves.items()}
        series = {name: line for name, line in named.items() if line}
        plots.append(curve_svg(" · ".join(filter(None, (phase, key))), series))
    return plots


def _neighbours(run: Path, suffix: str) -> list[tuple[str, str]]:
    """What ``final/nearest.json`` holds: heat maps of similarities, and queries with their nearest names."""
    file = run / "final" / "nearest.json"
    sections = []
    for found in json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []:
        cards = "".join(_card(query) for query in found["queries"])
        heat = heat_svg(found["heat"]["rows"], found["heat"]["columns"], found["heat"]["values"])
        legend = '<p class="small">Drawn at random with a fixed seed, not chosen.</p>'
        sections.append((f"{found['name']}{suffix}", f'{heat}{legend}<div class="cards">{cards}</div>'))
    return sections


def _card(query: Mapping[str, Any]) -> str:
    path = Path(query["media"])
    if not path.is_file():
        shown = f'<div class="small">file is gone: {esc(path.name)}</div>'
    elif query["kind"] == "audio":
        mime = "audio/ogg" if path.suffix == ".ogg" else "audio/wav"
        shown = f'<audio controls preload="none" src="{data_uri(path, mime)}"></audio>'
    else:
        shown = f'<img src="{picture_uri(path, 128)}" alt="">'
    lines = []
    for name, score, right in query["nearest"]:
        style = ' class="right"' if right else ""
        lines.append(f"<dd{style}>{esc(name)} <span class='small'>{score:.2f}</span>{' ✓' if right else ''}</dd>")
    return f'<div class="card">{shown}<dl><dt>{esc(query["truth"])}</dt>{"".join(lines)}</dl></div>'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{esc(c)}</th>" for c in head)
    body = "".join("<tr>" + "".join(f"<td>{esc(c)}</td>" for c in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
